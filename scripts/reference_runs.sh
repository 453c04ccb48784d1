#!/usr/bin/env bash
# Makes the runs of docs/results.md: real data, two small pretrained backbones, several runs at once on all GPUs.
#   scripts/reference_runs.sh SHARED OUTPUTS glue|text|text_long|grid|grid_sst2|peft|curves [OVERRIDE ...]
# SHARED holds backbones/minilm-l6, backbones/bart-mini and data/. Run again, the script skips finished runs.
#   glue  sst2, rte and a pool of NLI sets, five methods on MiniLM-L6: 30 runs
#   text  WebNLG, en-ro and XSum, five methods on a small BART, each with the best of three learning rates on dev: 45
#   text_long  WebNLG and en-ro at the rates that `text` chose, for four times as many steps: 10
#   grid  the rows of tables 3, 5, 6 and 12 at the paper's shares of the backbone, on WebNLG, two seeds: 40. As in the
#         paper, all rows have one learning rate, except full fine-tuning, whose best one is lower.
#   grid_sst2  the same rows on SST-2, one epoch: 40
#   peft  SST-2, ten methods of the peft library and ten of ours, at 1% of the backbone where they have a rank, 600 steps,
#         three seeds, each with the best of three learning rates on the first seed: 60 and 60 trials, of which 20 are runs
#   curves  200 steps of MAM on WebNLG, three seeds: 3. To compare losses with and without fast paths, run it again with
#         another OUTPUTS and trainer.graphs=false trainer.padding_free=false trainer.fused_loss=false, or with
#         model.dtype=auto trainer.compile=layers
# Each part is one sweep, so runs of all its grids are trained at once: JOBS runs, or as many as memory and cores allow.
# scripts/reference_runs.sh ... debug=smoke trainer.max_steps=4 tries all of it in minutes.
set -euo pipefail
shared=$(cd "$1" && pwd) outputs=$2 part=$3
shift 3
more=("$@")
sweep=()
grid() { # adds a grid to the sweep: the first one's words, with these instead of those with the same key
  sweep+=(${sweep[0]:+and} "$@" "${more[@]}")
}

minilm=(model=bert_base model.path="$shared/backbones/minilm-l6" trainer=quick)
sst2=("${minilm[@]}" task=sst2 task.data_dir="$shared/data/sst2")
case $part in
glue)
  rte=(task=rte task.data_dir="$shared/data/rte" seed=42,1,2)
  nli=(task=mnli task.data_dir=null task.train_file="$shared/data/nli/pool_no_mnli.jsonl"
    task.validation_file="$shared/data/nli/mnli_dev_matched.jsonl" trainer.epochs=2 seed=42)
  # With a prefix, pairs need a fifth of the presets' rates: at 5e-4 the loss does not fall.
  grid "${sst2[@]}" method=full,lora,adapter,prefix,mam seed=42,1
  grid "${rte[@]}" method=full,lora,adapter
  grid "${rte[@]}" method=prefix,mam trainer.learning_rate=1e-4
  grid "${nli[@]}" method=full,lora,adapter
  grid "${nli[@]}" method=prefix,mam trainer.learning_rate=1e-4
  ;;
text | text_long | grid | curves)
  bart=(model=bart_large model.path="$shared/backbones/bart-mini" trainer=quick trainer.eval_batch_size=256)
  webnlg=("${bart[@]}" task=webnlg task.data_dir="$shared/data/webnlg") # in the first grid, so that all have the BART
  ;;&
text | text_long)
  enro=(task=wmt16_enro task.data_dir=null task.train_file="$shared/data/en_ro/train_merged.jsonl"
    task.validation_file="$shared/data/en_ro/newsdev2016.jsonl" task.test_file="$shared/data/en_ro/newstest2016.jsonl")
  ;;&
text)
  enro+=(trainer.max_steps=1500 trainer.evaluate_every=500)
  xsum=(task=xsum task.data_dir="$shared/data/xsum_subset" trainer.epochs=12 trainer.evaluate_every=390)
  for task in webnlg enro xsum; do
    declare -n words=$task
    grid "${words[@]}" search=lr3 method=full
    grid "${words[@]}" method=prefix budget=3.6%
    grid "${words[@]}" method=lora_ffn,scaled_parallel_adapter budget=6.1%
    grid "${words[@]}" method=mam budget=6.7%
  done
  ;;
text_long)
  long() { # LORA_RATE WORDS: the rate of the other methods is the same for both tasks
    local lora=$1 words=("${@:2}")
    grid "${words[@]}" method=full trainer.learning_rate=3e-4
    grid "${words[@]}" method=prefix budget=3.6% trainer.learning_rate=1.5e-3
    grid "${words[@]}" method=scaled_parallel_adapter budget=6.1% trainer.learning_rate=1.5e-3
    grid "${words[@]}" method=lora_ffn budget=6.1% trainer.learning_rate="$lora"
    grid "${words[@]}" method=mam budget=6.7% trainer.learning_rate=1.5e-3
  }
  long 1e-3 "${webnlg[@]}" trainer.epochs=12
  long 3e-3 "${enro[@]}" trainer.max_steps=6000 trainer.evaluate_every=1000
  ;;
grid | grid_sst2)
  if [ "$part" = grid ]; then
    words=("${webnlg[@]}") full=3e-4 others=1e-3
  else
    words=("${sst2[@]}" trainer.epochs=1) full=1e-4 others=5e-4
  fi
  at() { # SHARE ROWS: rows of the tables with the same share of the backbone
    grid budget="$1" row="$2" trainer.learning_rate="$others"
  }
  grid "${words[@]}" seed=42,1 row=full trainer.learning_rate="$full"
  grid row=bitfit trainer.learning_rate="$others"
  at 2.4% sa_ffn_200,pa_ffn_200
  at 3.6% prefix_200,sa_attention_200,pa_attention_200
  at 6.1% sa_ffn_512,pa_ffn_512,scaled_pa_ffn_512,scaled_pa_ffn_512_trained,lora_ffn_102,lora_ffn_102_s1
  at 6.7% mam_30_512
  at 7.2% lora_attention_200
  at 9.2% prefix_512,sa_attention_512,pa_attention_512
  at 12.3% sa_ffn_1024,pa_ffn_1024
  ;;
peft) # the reported examples select nothing: a tenth of the training file does
  held_out=("${minilm[@]}" task=sst2 task.hub_id=null task.data_dir=null task.train_file="$shared/data/sst2/train.tsv"
    task.test_file="$shared/data/sst2/dev.tsv" task.selection_split=held_out task.max_selection=2000)
  grid "${held_out[@]}" search=lr3 trainer.max_steps=600 seed=42,1,2 method=full,bitfit
  grid method=lora,lora_plus,lora_ffn,lora_all,adapter,parallel_adapter,prefix,mam budget=1%
  grid method=dora,rslora,pissa,adalora,hra,loha,miss budget=1%
  grid method=vera,oft,road # which have no rank, or one that adds a number for each
  ;;
curves)
  grid "${webnlg[@]}" method=mam budget=6.7% seed=42,1,2 trainer.max_steps=200 task.max_selection=100 task.max_eval=100
  ;;
*)
  echo "reference_runs.sh: $part is none of glue, text, text_long, grid, grid_sst2, peft, curves" >&2
  exit 2
  ;;
esac
exec python3 -m peftbench train -m output_dir="$outputs" jobs="${JOBS:-auto}" "${sweep[@]}"
