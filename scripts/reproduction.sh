#!/usr/bin/env bash
# Makes the runs of docs/reproduction.md: are the paper's claims true of other pretrained backbones and tasks?
#   scripts/reproduction.sh SHARED BACKBONES OUTPUTS CELL [STEP ...]
#   LIST=1 scripts/reproduction.sh ...   lists the points of the steps with their sizes, and trains nothing
# CELL is BACKBONE/TASK, one of:
#   minilm-l6/sst2    minilm-l6/rte     minilm-l6/nli           mpnet-base/sst2        mpnet-base/nli
#   bart-mini/webnlg  bart-mini/en_ro   smollm2-135m/webnlg     smollm2-135m/sst2      smollm2-135m/xsum
# SHARED holds data/; BACKBONES the folders of the backbones. All runs of a cell have the same number of steps, and
# every point has the best of five learning rates by the selection split (seed 42), then the seeds 42, 1 and 2: 7 runs.
# Where the best rate is the outermost of the five, up to two further ones beyond it are tried (search.extend=2).
#
# STEP: each gives a verdict on a claim; those that decide most come first. The steps of one call are one sweep, by
# default all of them; a point that two of them share is trained once.
#   insertion   sequential and parallel adapters, attention and FFN, 2%: parallel beats sequential, the FFN is better
#   mam         full fine-tuning, MAM and what it is made of, 6.7%: MAM matches the first and is the best of its size
#   heads       modified heads and other places at the attention, 0.1%: heads are best when little is stored
#   saturation  prefix tuning and parallel adapters at the attention, 2% and 6.7%: prefix tuning saturates
#   scaling     FFN with a scale and without, 2%: scaling helps
#   small       the points of `heads` at 0.5%, the size of the paper's "0.1%" (l = 30) by its own formula
#   sizes       the points of `insertion` and `scaling`, and the mixtures of table 6, at 6.7%
#   tables      what the tables 3, 4, 5, 6 and 12 have besides, at 0.1, 0.5, 2 and 6.7%
# Two steps are for calls of their own, each a search over the four axes, of 200 trials with seed 42:
#   search_0.5%, search_2%  the best point beside the presets of MAM, LoRA, the scaled parallel adapter and prefix tuning
#               under that budget, each with the best of five learning rates, and all with the seeds 1, 2 and 3
#               (search.trials=N: N trials; search.minutes=M: no trial begins after M minutes). peftbench claims OUTPUTS
#               --searches says what they have found.
# Run again, the script skips finished runs and resumes interrupted ones. Of a finished run the record is enough, so that
# a machine continues what another began, if OUTPUTS has what scripts/keep_records.py kept of it.
# Words with = go to peftbench train, the last of a key counts:
#   seed=42,1,2,3,4                                         two more seeds
#   trainer.compile=layers                                  less than half the time of SmolLM2 on a GPU
#   task.selection_split=held_out task.deal_by=category     two untrained categories of WebNLG choose the rates
#   debug=smoke trainer.max_steps=4 task.max_selection=16   tries a step in minutes
set -euo pipefail
if [ $# -lt 4 ]; then
  sed -n 's/^# \{0,1\}//; 2,4p' "$0" >&2
  exit 2
fi
data=$(cd "$1" && pwd)/data backbones=$(cd "$2" && pwd) outputs=$3 cell=$4
shift 4
steps=() more=() searches=() of_study=()
for word in "$@"; do
  case $word in
  search_0.5% | search_2%) searches+=("${word#search_}") ;;
  search.*=*) of_study+=("$word") ;;
  *=*) more+=("$word") ;;
  *) steps+=("$word") ;;
  esac
done
if [ ${#searches[@]} -gt 0 ] && [ ${#steps[@]} -gt 0 ]; then
  echo "reproduction.sh: search_2% and search_0.5% are for a call without other steps, here ${steps[*]}" >&2 && exit 2
fi
[ ${#steps[@]} -gt 0 ] || steps=(insertion mam heads saturation scaling small sizes tables)

backbone=${cell%/*} task=${cell#*/} without=""
case $cell in
minilm-l6/sst2 | minilm-l6/rte | minilm-l6/nli | mpnet-base/sst2 | mpnet-base/nli) model=bert_base ;;
bart-mini/webnlg | bart-mini/en_ro) model=bart_large ;;
smollm2-135m/webnlg | smollm2-135m/sst2 | smollm2-135m/xsum) model=smollm2_135m ;;
*) echo "reproduction.sh: there is no cell $cell; the comment at the top of the script lists them" >&2 && exit 2 ;;
esac
case $backbone in
mpnet-base) without='prefix*|mh_*|mam_*|prompt_*' ;; # transformers computes its attention where no head can be modified
smollm2-135m) without=bitfit ;;                      # it has no biases
esac
# The reported examples select nothing: where a task reports its dev set, a tenth of the training file selects.
held_out=(task.hub_id=null task.data_dir=null task.selection_split=held_out task.max_selection=2000)
case $task in
sst2)
  words=(task=sst2 "${held_out[@]}" task.train_file="$data/sst2/train.tsv" task.test_file="$data/sst2/dev.tsv"
    trainer.max_steps=3600 trainer.evaluate_every=600)
  ;;
rte)
  words=(task=rte "${held_out[@]}" task.train_file="$data/rte/train.tsv" task.test_file="$data/rte/dev.tsv"
    trainer.max_steps=1400 trainer.evaluate_every=140)
  ;;
nli)
  words=(task=mnli "${held_out[@]}" task.train_file="$data/nli/pool_no_mnli.jsonl"
    task.test_file="$data/nli/mnli_dev_matched.jsonl" task.further_splits=[]
    trainer.max_steps=6000 trainer.evaluate_every=1000)
  ;;
webnlg) # six epochs, of which the decoder needs fewer
  words=(task=webnlg task.data_dir="$data/webnlg" trainer.max_steps=3396 trainer.evaluate_every=1132)
  [ "$backbone" = bart-mini ] || words+=(trainer.max_steps=1132 trainer.evaluate_every=566 task.max_selection=300)
  ;;
en_ro)
  words=(task=wmt16_enro task.data_dir=null task.train_file="$data/en_ro/train_merged.jsonl"
    task.validation_file="$data/en_ro/newsdev2016.jsonl" task.test_file="$data/en_ro/newstest2016.jsonl"
    trainer.max_steps=6000 trainer.evaluate_every=1000)
  ;;
xsum) words=(task=xsum task.data_dir="$data/xsum_subset" trainer.max_steps=780 trainer.evaluate_every=260) ;;
esac
words+=(model="$model" model.path="$backbones/$backbone" trainer=quick search=lr5 search.extend=2 seed=42,1,2)

if [ ${#searches[@]} -gt 0 ]; then
  [ "$backbone" != mpnet-base ] || { echo "reproduction.sh: no head of mpnet-base can be modified, as MAM does" >&2 && exit 2; }
  budgets=$(IFS=, && echo "${searches[*]}")
  echo "$cell: four methods of $budgets, each of 8 to 10 trainings, and a search over the axes for each budget"
  times="1, 0.3, 3, 0.1, 10"
  # On SmolLM2 no method is best at a tenth of its preset's rate, and parallel adapters are at 30 times theirs.
  [ "$backbone" != smollm2-135m ] || times="1, 0.3, 3, 10, 30"
  # What is typed before `and` is for both grids: neither the trials nor the learning rates have a seed that is reported.
  words+=("${more[@]}" budget="$budgets" search.seed=42 seed=1,2,3)
  methods=method=mam,lora,scaled_parallel_adapter,prefix
  [ -z "${LIST:-}" ] || exec python3 -m peftbench params -m "${words[@]}" seed=42 $methods
  exec python3 -m peftbench train -m output_dir="$outputs" jobs="${JOBS:-auto}" "${words[@]}" \
    $methods and method=mam search=optuna search.extend=0 search.trials=200 \
    "search.keys={trainer.learning_rate: {times: [$times]}}" "${of_study[@]}"
fi

sweep=()
declare -A taken=()
at() { # SHARE ROW ...: rows of the tables that store the same share of the backbone, or null: that have no size
  local share=$1 rows="" row
  for row in "${@:2}"; do
    [[ $row != @($without) ]] || continue
    [ -n "${taken[$share $row]:-}" ] || rows+=${rows:+,}$row
    taken[$share $row]=yes
  done
  [ -z "$rows" ] || sweep+=(${sweep[0]:+and} budget="$share" row="$rows")
}
for step in "${steps[@]}"; do
  case $step in
  insertion) at 2% sa_ffn_200 pa_ffn_200 sa_attention_200 pa_attention_200 ;;
  mam)
    at null full
    at 6.7% mam_30_512 scaled_pa_ffn_512 lora_ffn_102 pa_ffn_200
    ;;
  heads) at 0.1% prefix_200 mh_pa_attention_200 pa_attention_200 sa_attention_200 lora_attention_200 ;;
  saturation)
    at 2% prefix_200 pa_attention_200
    at 6.7% prefix_200 pa_attention_200
    ;;
  scaling) at 2% scaled_pa_ffn_512 pa_ffn_200 lora_ffn_102 lora_ffn_102_s1 ;;
  small) at 0.5% prefix_200 mh_pa_attention_200 pa_attention_200 sa_attention_200 lora_attention_200 ;;
  sizes)
    at 6.7% sa_ffn_200 pa_ffn_200 sa_attention_200 pa_attention_200
    at 6.7% scaled_pa_ffn_512 lora_ffn_102 lora_ffn_102_s1 scaled_pa_ffn_512_trained
    at 6.7% pa_attention_30_pa_ffn_512 prefix_30_lora_ffn_102 lora_attention_200
    ;;
  tables)
    at null bitfit prompt_200
    for share in 0.1% 0.5% 2% 6.7%; do
      at $share prefix_200 prefix_no_gating_30 mh_pa_attention_200 sa_attention_200 pa_attention_200 lora_attention_200
      at $share sa_ffn_200 pa_ffn_200 pfeiffer_600 scaled_pa_ffn_512 scaled_pa_ffn_512_trained
    done
    for share in 0.5% 2% 6.7%; do # 0.1% is too little for them
      at $share lora_ffn_102 lora_ffn_102_s1 mam_30_512 pa_attention_30_pa_ffn_512 prefix_30_lora_ffn_102
    done
    ;;
  *) echo "reproduction.sh: there is no step $step; the comment at the top of the script lists them" >&2 && exit 2 ;;
  esac
done

[ -z "${LIST:-}" ] || more+=(seed=42)
# Later grids have the first one's words, so that the task, the backbone and what was typed stand there once.
sweep=("${words[@]}" "${more[@]}" "${of_study[@]}" "${sweep[@]}")
points=${#taken[@]}
trainings="$((7 * points)) to $((9 * points)) trainings"
echo "$cell: $points points; with five to seven trials, one of which is a run, and two more seeds: $trainings"
[ -z "${LIST:-}" ] || exec python3 -m peftbench params -m "${sweep[@]}"
exec python3 -m peftbench train -m output_dir="$outputs" jobs="${JOBS:-auto}" "${sweep[@]}"
