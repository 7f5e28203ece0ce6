#!/usr/bin/env bash
# Two doors for a newcomer, each of which does all the set-up:
#   ./run_all.sh demo    handwritten digits, clean and with 40% wrong labels: Baseline 1, PBT, EPBT; a table, a picture
#   ./run_all.sh test    the tests
#
# The experiments of the paper, five seeds each. All can be stopped and called again: they go on where they were.
#   ./run_all.sh figure2     CIFAR-10, ResNet-32: Baseline 1, PBT, EPBT        ./run_all.sh table1   figures 2, 3 and 4
#   ./run_all.sh figure3     CIFAR-10, four wide ResNets: Baseline 1, EPBT     ./run_all.sh table2   the same
#   ./run_all.sh figure4     SVHN, ResNet-32: Baseline 1, EPBT                 ./run_all.sh all      all of the paper's
#   ./run_all.sh figure5     ancestries of the losses, from the runs of figure 2
#   ./run_all.sh figure6     learning rate and momentum, from the runs of figure 2
#   ./run_all.sh ablations   EPBT on figure 2's data with one part taken out at a time, or put in
#   ./run_all.sh practice    what as many networks for as long reach without evolution, and replayed schedules
# Our own, on two cores:
#   ./run_all.sh noise       the digits with 0, 20, 40 and 60% wrong labels: ten methods, ten seeds; six hours
#   ./run_all.sh noise-fashion   4,000 images of Fashion-MNIST, 40% wrong labels; some hours
#   ./run_all.sh noise-augmented   10,000 images of it, flipped, shifted and cut out; some hours
#   ./run_all.sh scale       all of Fashion-MNIST, clean: Baseline 1, PBT, EPBT, --preset best; some hours
#   ./run_all.sh fashion     2,000 images of Fashion-MNIST: Baseline 1, PBT, independent networks, EPBT, --preset best
#   ./run_all.sh preset      --preset best on seeds that were not used to choose it, and what each of its parts is worth
#   ./run_all.sh metric      long-tailed Fashion-MNIST: EPBT evolving for balanced accuracy, for accuracy, and Baseline 1
#   ./run_all.sh digits      the digits with the paper's P = 40 and 25 generations of 8 epochs
#   ./run_all.sh precision   Baseline 1 and --preset best in float32 beside bfloat16
# Before any of them: SEEDS="1 2" are its seeds; SCALE=small runs the paper's on the digits; RESULTS=results writes the
# tables, figures and logs into results/ in place of figures/.
# After an experiment: --dry-run prints the commands and their cost and runs none.
set -euo pipefail
cd "$(dirname "$0")"
python=.venv/bin/python
scale=${SCALE:-paper}
section=${1:-help}
dry_run=$([ "${2:-}" = --dry-run ] && echo yes || true)
if [ "$section" != test ] && [ $# -gt 1 ] && { [ -z "$dry_run" ] || [ $# -gt 2 ]; }; then
    echo "run_all.sh: after $section only --dry-run is accepted, not ${*:2}" >&2; exit 2
fi

seeds="1 2 3 4 5"
case $scale in
    paper)
        first="--dataset cifar10 --download --model resnet32"
        wide="wrn-10-12 wrn-16-8 wrn-22-6 wrn-28-5"; wide_data="--dataset cifar10 --download"
        second="--dataset svhn --download --model resnet32" ;;
    small)  # with one thread the numbers are the same on any count of cores
        seeds="1 2 3"
        small="--dataset digits --preset paper --threads 1"
        first="$small --model resnet8 --population 8 --generations 8 --epochs 2"
        wide="wrn-10-1 wrn-16-1"; wide_data="$small --population 6 --generations 5 --epochs 1"
        second="$small --model resnet20 --population 6 --generations 10 --epochs 1 --milestones 0.5 0.75" ;;
    *) echo "SCALE must be paper or small, not $scale" >&2; exit 2 ;;
esac
seeds=${SEEDS:-$seeds}

setup() {  # make .venv from requirements.txt when it is missing or older
    if [ ! -e .venv/complete ] || [ requirements.txt -nt .venv/complete ]; then
        echo "installing the requirements into .venv (a minute or two; torch is large)"
        python3 -m venv .venv
        $python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        touch .venv/complete
    fi
}

run() {  # run NAME SEED OPTIONS: one run, finished or gone on with; its folder is runs/NAME-SEED
    local folder=runs/$1-$2 seed=$2 options=("${@:3}")
    if [ -e "$folder/summary.json" ]; then return; fi
    echo "+ python epbt.py --out $folder --seed $seed ${options[*]}"
    if [ -n "$dry_run" ]; then
        if [ "${planned:-}" != "${options[*]}" ]; then  # every seed costs the same
            cost=$($python epbt.py --plan "${options[@]}")
            planned="${options[*]}"
        fi
        echo "$cost"
        return
    fi
    if [ -e "$folder/config.json" ]; then options+=(--resume); fi
    $python epbt.py --out "$folder" --seed "$seed" "${options[@]}"
}

experiment() {  # experiment NAME OPTIONS: one run a seed
    local seed
    for seed in $seeds; do run "$scale/$1" "$seed" "${@:2}"; done
}

draw() {  # draw FOLDER NAME...: tables, figures and logs of these experiments
    local options=() name seed out=$1 command="./run_all.sh $section"
    if [ "$scale" = small ]; then out=small-$1 command="SCALE=small $command"; fi
    if [ -n "${SEEDS:-}" ]; then command="SEEDS=\"$SEEDS\" $command"; fi
    for name in ${against:-}; do options+=(--reference "$name"); done
    for name in "${@:2}"; do for seed in $seeds; do options+=("runs/$scale/$name-$seed"); done; done
    if [ -z "$dry_run" ]; then
        $python figures.py --out "${RESULTS:-figures}/$out" --command "$command" "${options[@]}"
    fi
}

demo() {  # 11 of the digits' 15 generations: three minutes on two cores
    scale=demo
    seeds=${SEEDS:-1}
    local share names=()
    for share in 0 0.4; do
        for method in baseline pbt epbt; do
            experiment $method-$share --method $method --dataset digits --threads 1 --label-noise $share --generations 11
            names+=($method-$share)
        done
    done
    draw demo "${names[@]}"
}

noise_runs() {  # noise_runs SHARE OPTIONS: the methods on one data set with a share of wrong labels
    local share=$1 options=(--threads 1 --label-noise "$@")
    experiment baseline-$share       --method baseline "${options[@]}"
    experiment early-stopping-$share --method baseline "${options[@]}" --early-stopping
    experiment gce-$share            --method baseline "${options[@]}" --loss generalized-cross-entropy
    experiment gce-early-stopping-$share --method baseline "${options[@]}" --loss generalized-cross-entropy --early-stopping
    experiment label-smoothing-$share --method baseline "${options[@]}" --loss label-smoothing
    experiment pbt-$share            --method pbt "${options[@]}"
    experiment epbt-$share           --method epbt "${options[@]}" --preset known
    experiment epbt-cross-entropy-$share --method epbt "${options[@]}" --preset known --loss cross-entropy
    experiment epbt-published-$share --method epbt "${options[@]}" --preset paper
    replays replay-$share epbt-$share "${options[@]}"
}
noise_rows="baseline early-stopping gce gce-early-stopping label-smoothing pbt epbt epbt-cross-entropy epbt-published replay"

noise() {  # seeds 1 to 3 chose: docs/choices-measured.md
    local share row names=()
    scale=noise seeds=${SEEDS:-11 12 13 14 15 16 17 18 19 20}
    for share in 0.4 0 0.2 0.6; do
        noise_runs $share --dataset digits
        for row in $noise_rows; do names+=($row-$share); done
    done
    against="epbt" draw noise "${names[@]}"
}

wrong_fashion="--dataset fashion --download --validation 0.1 --batch-size 32 --precision bfloat16 --population 12
    --generations 15 --epochs 4 --threads 1 --label-noise 0.4"

noise_fashion() {
    local data="$wrong_fashion --limit 4000 --augmentation none"
    scale=noise-fashion seeds=${SEEDS:-11 12 13 14 15}
    experiment baseline-0.4           --method baseline $data
    experiment gce-early-stopping-0.4 --method baseline $data --loss generalized-cross-entropy --early-stopping
    experiment epbt-0.4               --method epbt $data --preset known
    experiment epbt-cross-entropy-0.4 --method epbt $data --preset known --loss cross-entropy
    experiment pbt-0.4                --method pbt $data
    against="epbt" draw noise-fashion baseline-0.4 gce-early-stopping-0.4 pbt-0.4 epbt-0.4 epbt-cross-entropy-0.4
}

noise_augmented() {
    local data="$wrong_fashion --limit 10000"
    scale=noise-augmented seeds=${SEEDS:-11 12}
    experiment baseline-0.4 --method baseline $data
    experiment epbt-0.4     --method epbt $data --preset known
    experiment best-0.4     --method epbt $data --preset best
    against="baseline" draw noise-augmented baseline-0.4 epbt-0.4 best-0.4
}

scale() {
    local data="--dataset fashion --download --generations 25 --epochs 1 --population 8 --precision bfloat16 --threads 1"
    scale=scale seeds=${SEEDS:-1}
    experiment baseline       --method baseline $data
    experiment epbt           --method epbt $data --preset best
    experiment epbt-published --method epbt $data --preset paper
    experiment pbt            --method pbt $data
    draw scale baseline pbt epbt epbt-published
}

figure2_runs() { for method in baseline pbt epbt; do experiment figure2/$method --method $method $first; done; }
figure2_names="figure2/baseline figure2/pbt figure2/epbt"
figure2() { figure2_runs; draw figure2 $figure2_names; }

figure3_names=$(for model in $wide; do echo figure3/$model/baseline figure3/$model/epbt; done)
figure3_runs() {
    local model method
    for model in $wide; do
        for method in baseline epbt; do
            experiment figure3/$model/$method --method $method $wide_data --model $model
        done
    done
}
figure3() { figure3_runs; draw figure3 $figure3_names; }

figure4_runs() { for method in baseline epbt; do experiment figure4/$method --method $method $second; done; }
figure4_names="figure4/baseline figure4/epbt"
figure4() { figure4_runs; draw figure4 $figure4_names; }

tables() { figure2_runs; figure3_runs; figure4_runs; draw "$1" $figure2_names $figure3_names $figure4_names; }

figure5() { experiment figure2/epbt --method epbt $first; draw figure5 figure2/epbt; }
figure6() { experiment figure2/epbt --method epbt $first; draw figure6 figure2/epbt; }

ablations() {
    experiment figure2/epbt           --method epbt $first
    experiment without-novelty        --method epbt $first --novelty off
    experiment without-pulsation      --method epbt $first --novelty always
    experiment without-distillation   --method epbt $first --distillation 0
    experiment without-crossover      --method epbt $first --crossover 0
    experiment without-taylorglo      --method epbt $first --loss cross-entropy
    experiment with-known-losses      --method epbt $first --known-losses 2
    experiment with-cross-entropy     --method epbt $first --add-cross-entropy
    experiment with-averaged-weights  --method epbt $first --average-weights 1
    experiment best                   --method epbt $first --preset best
    draw ablations figure2/epbt without-novelty without-pulsation without-distillation without-crossover \
        without-taylorglo with-known-losses with-cross-entropy with-averaged-weights best
}

replays() {  # replays NAME RUN OPTIONS: one network by the schedule that each run of RUN evolved
    local seed
    for seed in $seeds; do
        local source=runs/$scale/$2-$seed
        if [ -n "$dry_run" ] && [ ! -e "$source/schedule.json" ]; then
            echo "+ python epbt.py --out runs/$scale/$1-$seed --seed $seed ${*:3} --replay $source"
            echo "one network, as many epochs as that schedule has or the options say"
        else
            run "$scale/$1" "$seed" "${@:3}" --replay "$source"
        fi
    done
}

practice() {
    experiment figure2/baseline --method baseline $first
    experiment random           --method random $first
    experiment best             --method epbt $first --preset best
    replays replay best $first
    draw practice figure2/baseline random best replay
}

fashion_data="--dataset fashion --download --limit 2000 --validation 200 --generations 8 --epochs 3 --precision bfloat16 --threads 1"

fashion_runs() {
    scale=fashion
    experiment baseline --method baseline $fashion_data
    experiment pbt      --method pbt $fashion_data
    experiment best     --method epbt $fashion_data --preset best
    replays replay best $fashion_data
}

fashion() {
    fashion_runs
    experiment epbt     --method epbt $fashion_data --preset paper
    experiment random   --method random $fashion_data
    draw fashion baseline pbt random epbt best replay
}

preset() {
    local best="--method epbt $fashion_data --preset best"
    seeds=${SEEDS:-6 7 8 9 10}
    fashion_runs
    experiment baseline-averaged  --method baseline $fashion_data --average-weights 1 --milestones
    experiment random-averaged    --method random $fashion_data --average-weights 1 --milestones
    experiment best-cross-entropy $best --loss cross-entropy
    experiment best-eq2-alone     $best --no-add-cross-entropy
    experiment best-last-weights  $best --average-weights 0
    experiment best-decay         $best --milestones 0.3 0.6 0.8
    experiment best-fixed-cutout  $best --no-evolve-cutout
    against="best baseline" draw preset baseline pbt best replay baseline-averaged random-averaged best-cross-entropy best-eq2-alone \
        best-last-weights best-decay best-fixed-cutout
}

precision() {
    scale=fashion
    seeds=${SEEDS:-1 2 3 4 5 6 7 8 9 10}
    experiment baseline         --method baseline $fashion_data
    experiment baseline-float32 --method baseline $fashion_data --precision float32
    experiment best             --method epbt $fashion_data --preset best
    experiment best-float32     --method epbt $fashion_data --preset best --precision float32
    against="baseline best" draw precision baseline baseline-float32 best best-float32
}

metric() {  # 599 images of the first class to 20 of the last, drawn by the seed; the test images are balanced
    local data="--dataset fashion-long-tail --download --limit 1862 --batch-size 32 --generations 6 --epochs 3 --precision bfloat16 --threads 1"
    scale=metric seeds=${SEEDS:-2 3 4 5 6}  # 1 and 11 chose: results/metric
    experiment baseline      --method baseline $data
    experiment epbt-accuracy --method epbt $data --preset best
    experiment epbt-balanced --method epbt $data --preset best --fitness balanced-accuracy
    against="epbt-accuracy baseline" draw metric baseline epbt-accuracy epbt-balanced
}

digits() {
    local protocol="--dataset digits --threads 1 --population 40 --generations 25 --epochs 8"
    scale=digits
    experiment baseline --method baseline $protocol
    experiment epbt     --method epbt $protocol --preset paper
    experiment best     --method epbt $protocol --preset best
    experiment pbt      --method pbt $protocol
    draw digits baseline epbt best pbt
}

case $section in
    demo) setup; demo ;;
    test) setup; $python -m pytest -q "${@:2}" ;;
    lint) setup; $python -m ruff check . ;;
    figure2|figure3|figure4|figure5|figure6|ablations|practice|fashion|preset|precision|metric|digits|\
    noise|noise-fashion|noise-augmented|scale)
        setup; ${section//-/_} ;;
    table1|table2) setup; tables $section ;;
    all) setup; tables table1; figure5; figure6; ablations; practice ;;
    *) sed -n '2,/^set -/{/^set -/!s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
