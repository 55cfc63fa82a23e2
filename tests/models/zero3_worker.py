"""Run by test_zero3.py, once per rank: three SGD steps under ZeRO-3 with every parameter partitioned."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from builders.tiny_vlm import SMALL, make_batch, make_vlm
from safetensors.torch import save_file

from psa_fast.models import PsaVLM, add_lora

STEPS, LR = 3, 0.1


def make_model(mode, tied=False):
    vlm = make_vlm(tied=tied)
    vlm.requires_grad_(False)
    torch.manual_seed(1)
    psa = PsaVLM.build(vlm, num_safety_tokens=3, **SMALL)
    torch.manual_seed(2)
    if mode == "lora":
        add_lora(psa, r=4, alpha=8, dropout=0.0)
        with torch.no_grad():
            for name, p in psa.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.05)
    elif mode == "full":
        psa.family.module(vlm, "language").requires_grad_(True)
        psa.family.module(vlm, "lm_head").requires_grad_(True)
    return psa.train()


def rows(batch, keep):
    """The given rows of a batch, with their images."""
    counts = batch["image_counts"].tolist()
    images = [batch["pixel_values"][sum(counts[:r]) + i] for r in keep for i in range(counts[r])]
    part = {k: v[keep] for k, v in batch.items() if k != "pixel_values"}
    return {**part, "pixel_values": torch.stack(images) if images else None}


def divisors(batch):
    return {
        "num_items": (batch["labels"][:, 1:] != -100).sum(),
        "num_concept_rows": (batch["image_counts"] > 0).sum(),
    }


def main():
    mode, out = sys.argv[1], Path(sys.argv[2])
    # the shared-memory op is a 40 s build, and a killed process leaves its lock behind for good
    deepspeed.comm.torch.build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    psa = make_model(mode, tied=mode == "full")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # the default clips at 1
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0},
    }
    trainable = [p for p in psa.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=psa, config=config, optimizer=torch.optim.SGD(trainable, lr=LR))
    batch = make_batch(3)
    keep = [0, 1, 2] if world == 1 else ([0, 1] if rank == 0 else [2])  # rank 1 has text only
    losses = []
    for _ in range(STEPS):
        # DeepSpeed averages over ranks; each rank's loss is its share of the global mean
        loss = engine(**rows(batch, keep), **divisors(batch)).loss * world
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    tensors = {}
    for name, p in psa.named_parameters():
        if p.requires_grad:
            with deepspeed.zero.GatheredParameters([p]):
                tensors[name] = p.detach().clone()
    with deepspeed.zero.GatheredParameters(list(psa.parameters())):
        psa.eval()
    features = psa.encode_images(batch["pixel_values"])  # inference modules work partitioned too
    logits = psa.concept_logits(features, batch["image_counts"], batch["input_ids"], batch["query_mask"])
    if rank == 0:
        psa.save_addon(out / "addon", tensors)
        save_file({**tensors, "logits": logits.detach().contiguous()}, out / "weights.safetensors")
        (out / "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
