#!/usr/bin/env bash
# What to measure while a GPU is at hand, in four steps of 4, 6, 10 and 10 minutes:
#
#     bash bench/gpu.sh 1       # does it run at all: tests, the demo, stopping, continuing, nccl
#     bash bench/gpu.sh 2       # how fast: steps and trainings at the paper's shapes
#     bash bench/gpu.sh 3       # the record: the published recipe on Imagenette
#     bash bench/gpu.sh 4       # the paper's orderings: Table 7, Fig. 6, Table 8
#
# IMAGES: a folder with train/ and val/, such as Imagenette; without it the embedded images.
# OUT: gets the results; default: gpu-results.
# DRY=1: the same commands at tiny sizes, on a CPU.
#
# Each command has its seconds. Then it is stopped (SIGTERM), and the next one begins. A command
# that fails is reported, and the others follow. What a command prints stands in OUT too.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-gpu-results}
python=${PYTHON:-python3}
dry=${DRY:-}
mkdir -p "$out"

# run NAME SECONDS COMMAND ...
run() {
    local name=$1 seconds=$2
    shift 2
    if [ -n "$dry" ]; then
        seconds=$((4 * seconds))  # a CPU at hand may be slow to start
    fi
    echo "== $name: $*"
    local began=$SECONDS status=0
    timeout --signal=TERM --kill-after=15 "$seconds" "$@" 2>&1 | tee -a "$out/$name.txt" || status=$?
    echo "== $name: $((SECONDS - began)) s, exit status $status" | tee -a "$out/summary.txt"
}

data=()
if [ -n "${IMAGES:-}" ]; then
    data=(--data_path "$IMAGES")
fi
graph=(--cuda_graph true)
compiled=(--compile true)
small=()  # what makes a training tiny in a dry run
if [ -n "$dry" ]; then
    graph=() compiled=()
    small=(--device cpu --arch vit_nano --patch_size 8 --global_crops_size 16 --local_crops_size 8
        --local_crops_number 1 --out_dim 16 --batch_size_per_gpu 500 --epochs 1 --warmup_epochs 0
        --warmup_teacher_temp_epochs 0 --eval_size 16 --knn_images 100)
fi

does_it_run() {
    run card 5 nvidia-smi
    run tests 45 "$python" -m pytest -q -rs tests/test_cuda_graph.py tests/test_record.py \
        tests/test_waiting.py
    demo=("$python" train.py --preset demo "${small[@]}" --output_dir "$out/demo")
    run demo 30 "${demo[@]}"            # stopped by SIGTERM
    run demo-continued 20 "${demo[@]}"  # continues there
    run demo-compiled 75 "$python" train.py --preset demo "${small[@]}" "${compiled[@]}" \
        --output_dir "$out/demo-compiled"   # more than half of it compiles
    run demo-graph 20 "$python" train.py --preset demo "${small[@]}" "${graph[@]}" \
        --output_dir "$out/demo-graph"
    run k-nn 20 "$python" eval_knn.py --pretrained_weights "$out/demo/checkpoint.pth"
    run attention 10 "$python" visualize_attention.py --image_path figures/attention.png \
        --pretrained_weights "$out/demo/checkpoint.pth" --output_dir "$out/attention"
    run nccl 15 "$python" - <<'PYTHON'
import torch
import torch.distributed as dist

cuda = torch.cuda.is_available()
backend = "nccl" if cuda else "gloo"
device = "cuda" if cuda else "cpu"
dist.init_process_group(backend, init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
layer = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 5).to(device))
layer(torch.ones(2, 3, device=device)).sum().backward()
print(f"{backend}: a gradient is averaged:", layer.module.bias.grad.tolist())
dist.destroy_process_group()
PYTHON
}

# speed NAME SECONDS FLAGS ...; prints a line of JSON for each row of the bench
speed() {
    local name=$1 seconds=$2
    shift 2
    local flags=(--json --precision bf16 --compile --turns 5 --seconds 5)
    if [ -n "$dry" ]; then
        flags=(--json --device cpu --turns 1)
    fi
    run "$name" "$seconds" "$python" -m bench "$@" "${flags[@]}"
}

how_fast() {
    local net=(--arch vit_small --patch_size 16) base=(--arch vit_base --patch_size 16)
    local fine=(--arch vit_small --patch_size 8)
    local medium=64 large=256 larger=(512 1024) few=32
    local graph=(--cuda_graph) cost=(--precision bf16 --cuda_graph true)
    local profile=(--precision bf16 --compile)
    if [ -n "$dry" ]; then
        net=(--arch vit_nano --patch_size 8 --global_crops_size 16 --local_crops_size 8
            --local_crops_number 1 --out_dim 16)
        base=("${net[@]}") fine=("${net[@]}")
        medium=2 large=3 larger=(4 5) few=2
        graph=() cost=(--device cpu --eval_size 16)
        profile=(--device cpu)
    fi
    speed vits16-graph 50 "${net[@]}" --batch_size "$medium" --parts step memory "${graph[@]}"
    speed vits16 35 "${net[@]}" --batch_size "$medium" --parts step
    speed vits16-end 45 "${net[@]}" --batch_size "$medium" --parts batch end "${graph[@]}"
    speed vits16-large 45 "${net[@]}" --batch_size "$large" --parts step "${graph[@]}"
    # ours alone: stock code has no memory for such batches
    local B
    for B in "${larger[@]}"; do
        run "vits16-$B" 25 "$python" -m bench.cost --preset vanilla "${net[@]}" "${cost[@]}" \
            --batch_size_per_gpu "$B" --output_dir "$out/vits16-$B"
    done
    speed vits16-loader 30 "${net[@]}" --batch_size "$medium" --parts crops loader ema
    speed vitb16 40 "${base[@]}" --batch_size "$medium" --parts step "${graph[@]}"
    speed vits8 40 "${fine[@]}" --batch_size "$few" --parts step "${graph[@]}"
    run profile 25 "$python" -m bench "${net[@]}" --batch_size "$medium" --parts step --turns 2 \
        --profile "${profile[@]}"
}

record() {
    local limit=480 side=256 linear=(--epochs 10)
    if [ -n "$dry" ]; then
        limit=1 side=29 linear=(--epochs 1 --cached --device cpu)
    fi
    # each image is kept as a square of this side, stretched: say so beside the numbers
    run record 540 "$python" -m bench.record "${data[@]}" --preset imagenette --epochs 160 \
        --every 20 --limit "$limit" --side "$side" "${graph[@]}" "${small[@]}" \
        --output_dir "$out/record"
    run linear 55 "$python" -m evals.linear "${data[@]}" "${linear[@]}" \
        --pretrained_weights "$out/record/teacher.pth" --output_dir "$out/record"
}

orderings() {
    # small enough that all rows of a study run at once beside each other
    local recipe=(--arch vit_nano --patch_size 8 --global_crops_size 64 --local_crops_size 32
        --local_crops_number 6 --out_dim 1024 --batch_size_per_gpu 256 --lr 0.002
        --warmup_teacher_temp 0.03 --teacher_temp 0.04 --momentum_teacher 0.99 --momentum_teacher_end 1
        --num_workers 2)
    local epochs=30 seeds=(0 1) studies=(components teachers crops)
    if [ -n "$dry" ]; then
        recipe=("${small[@]}" --num_workers 0)
        epochs=1 seeds=(0) studies=(crops)
    fi
    local jobs=()
    for study in "${studies[@]}"; do
        for seed in "${seeds[@]}"; do
            # they share a folder, and each takes the rows that nobody has begun
            run "$study-$seed" 570 "$python" -m ablations "$study" --preset demo "${data[@]}" \
                --seeds "$seed" --epochs "$epochs" --output_dir "$out/orderings" \
                -- "${recipe[@]}" &
            jobs+=($!)
        done
    done
    for job in "${jobs[@]}"; do
        wait "$job" || true
    done
    # the last epoch of each row, those of unfinished ones too
    find "$out/orderings" -name log.txt -exec tail -n 1 {} + | tee "$out/orderings.txt"
}

case ${1:-} in
    1) does_it_run ;;
    2) how_fast ;;
    3) record ;;
    4) orderings ;;
    *)
        echo "usage: bash bench/gpu.sh 1|2|3|4" >&2
        exit 2
        ;;
esac
