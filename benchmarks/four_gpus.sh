#!/usr/bin/env bash
# Llama 3 8B on four GPUs of one host: benchmarks/four_gpus.sh [meshes] [derived] [saves] [speed]; all of them unless named.
# On 4 H200 they take 7, 4, 5 and 2 minutes. tp 2 x dp_replicate 2 needs 95 GiB of a GPU, a checkpoint 90 GiB of the disk.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3} out=${OUT:-runs/four-gpus}
train=(--loss linear --train.lr 1e-5 --eval.every 0 --sample.prompt None)
mkdir -p "$out"

meshes() { # one batch of 4 sequences on four meshes, and with the collectives on the copy engines
    "$python" benchmarks/meshes.py --config configs/llama3-8b-tp4.yaml --folder "$out/runs" --limit 170 --tolerance 0.05 \
        --output "$out/meshes.json" --plot "$out/meshes.png" \
        --meshes tp4 tp2-dp_shard2 tp2-pp2:train.micro_batch=1 tp2-dp_replicate2 tp4:plan=llama-overlap \
        -- "${train[@]}" --train.global_batch 4 --train.micro_batch 2 --train.warmup_steps 20 --train.log_every 10
}

derived() { # derived plans beside the presets
    "$python" -m colrow bench --shape llama3-8b --tp 4 --seq-len 8192 --micro-batch 2 --steps 8 -o "$out/derived.json" \
        --arms plain plain:plan=derive overlap overlap:plan=derive-overlap
}

saves() { # the lines "training waited" tell the pause of each kind of save
    for asynchronous in False True; do
        run=$out/saves-$asynchronous
        "$python" -m colrow train configs/llama3-8b-tp4.yaml "${train[@]}" --train.steps 22 --train.warmup_steps 2 \
            --checkpoint.every 12 --checkpoint.asynchronous "$asynchronous" --run.dir "$run"
        rm -r "$run/checkpoints"
    done
}

speed() { # what stands beside torchtitan in docs/guide/performance.md; TORCHTITAN=DIR, a checkout, measures it in the same call
    peer=${TORCHTITAN:+torchtitan:$TORCHTITAN}
    bench=("$python" -m colrow bench --shape llama3-8b --seq-len 8192 --steps 8)
    "${bench[@]}" --tp 4 --micro-batch 2 -o "$out/tp4.json" --arms $peer overlap
    "${bench[@]}" --tp 2 --dp-shard 2 --micro-batch 2 -o "$out/tp2-dp_shard2.json" --arms $peer overlap:fsdp.reshard_after_forward=false
    "${bench[@]}" --layers 16 --tp 4 --micro-batch 4 -o "$out/tp4-fp8.json" --arms $peer overlap:train.fp8=tensorwise
}

for part in "${@:-meshes derived saves speed}"; do
    for name in $part; do "$name"; done
done
