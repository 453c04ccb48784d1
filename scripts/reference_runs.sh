#!/usr/bin/env bash
# The runs behind docs/results.md: real data, two small pretrained backbones, several runs at once on all GPUs.
#   scripts/reference_runs.sh SHARED OUTPUTS glue|text|grid [OVERRIDE ...]
# SHARED holds backbones/minilm-l6, backbones/bart-mini and data/. What is done is skipped when it is run again.
#   glue  sst2, rte and a pool of NLI sets, five methods on MiniLM-L6
#   text  en-ro, XSum and WebNLG, five methods on a small BART, each with the best of three learning rates on dev
#   grid  the rows of tables 3, 5, 6 and 12 at the paper's shares of the backbone, on WebNLG, two seeds
# scripts/reference_runs.sh ... debug=smoke tries all of it in minutes.
set -euo pipefail
shared=$(cd "$1" && pwd) outputs=$2 part=$3
shift 3
more=("$@")
failed=0 # a run that fails stops no other sweep either
sweep() { python3 -m peftbench train -m output_dir="$outputs" jobs="${JOBS:-auto}" "$@" "${more[@]}" || failed=1; }

minilm=(model=bert_base model.path="$shared/backbones/minilm-l6" trainer=quick)
bart=(model=bart_large model.path="$shared/backbones/bart-mini" trainer=quick trainer.eval_batch_size=256)
webnlg=(task=webnlg task.data_dir="$shared/data/webnlg" "${bart[@]}" trainer.keep=best)

case $part in
glue)
  nli=(task=mnli task.train_file="$shared/data/nli/pool_no_mnli.jsonl"
    task.validation_file="$shared/data/nli/mnli_dev_matched.jsonl" trainer.epochs=2)
  # Pairs take a fifth of the presets' rates with a prefix: at 5e-4 the loss stays where it began.
  sweep task=sst2 task.data_dir="$shared/data/sst2" "${minilm[@]}" method=full,lora,adapter,prefix,mam seed=42,1
  sweep task=rte task.data_dir="$shared/data/rte" "${minilm[@]}" method=full,lora,adapter seed=42,1,2
  sweep task=rte task.data_dir="$shared/data/rte" "${minilm[@]}" method=prefix,mam trainer.learning_rate=1e-4 seed=42,1,2
  sweep "${nli[@]}" "${minilm[@]}" method=full,lora,adapter
  sweep "${nli[@]}" "${minilm[@]}" method=prefix,mam trainer.learning_rate=1e-4
  ;;
text)
  enro=(task=wmt16_enro task.train_file="$shared/data/en_ro/train_merged.jsonl"
    task.validation_file="$shared/data/en_ro/newsdev2016.jsonl" task.test_file="$shared/data/en_ro/newstest2016.jsonl"
    "${bart[@]}" trainer.max_steps=1500 trainer.evaluate_every=500)
  xsum=(task=xsum task.data_dir="$shared/data/xsum_subset" "${bart[@]}" trainer.epochs=12 trainer.evaluate_every=390)
  for task in webnlg enro xsum; do
    declare -n words=$task
    sweep "${words[@]}" search=lr3 method=full
    sweep "${words[@]}" search=lr3 method=prefix budget=3.6%
    sweep "${words[@]}" search=lr3 method=lora_ffn,scaled_parallel_adapter budget=6.1%
    sweep "${words[@]}" search=lr3 method=mam budget=6.7%
  done
  ;;
grid)
  at() { # SHARE ROWS: a table's rows whose share of the backbone is the same
    sweep "${webnlg[@]}" seed=42,1 budget="$1" row="$2"
  }
  sweep "${webnlg[@]}" seed=42,1 row=full,bitfit
  at 2.4% sa_ffn_200,pa_ffn_200
  at 3.6% prefix_200,sa_attention_200,pa_attention_200
  at 6.1% sa_ffn_512,pa_ffn_512,scaled_pa_ffn_512,scaled_pa_ffn_512_trained,lora_ffn_102,lora_ffn_102_s1
  at 6.7% mam_30_512
  at 7.2% lora_attention_200
  at 9.2% prefix_512,sa_attention_512,pa_attention_512
  at 12.3% sa_ffn_1024,pa_ffn_1024
  ;;
*)
  echo "reference_runs.sh: $part is none of glue, text, grid" >&2
  exit 2
  ;;
esac
exit $failed
