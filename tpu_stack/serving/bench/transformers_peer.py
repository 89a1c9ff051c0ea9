"""The peer of `tpu-stack serve bench`: `transformers` generate on random weights of one shape.

Run by an interpreter that has torch and transformers; it imports nothing of tpu_stack. Requests go
in batches of one length each, as `generate` takes them, in the order they are given; what a batch
computes for rows that are at their end counts for nothing. It says what it is once it is warm, and
then, for each line that it reads, runs all requests and says how long that took; all in JSON.

    yes run | head -3 | python transformers_peer.py FOLDER_WITH_CONFIG_JSON requests.json --batch 8
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]


def generate(model, device: str, batch: list[dict]) -> float:
    """Seconds for one batch: prompts padded on the left, the longest output of all."""
    longest = max(len(request["prompt"]) for request in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        ids[row, longest - len(request["prompt"]) :] = torch.tensor(request["prompt"])
        mask[row, longest - len(request["prompt"]) :] = 1
    new = max(request["new"] for request in batch)
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Prints a line of JSON of itself, and one for each line read."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("requests")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    with open(options.requests, encoding="utf-8") as file:
        requests = json.load(file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(options.folder)
    dtype = getattr(torch, options.dtype)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None
    batches = [requests[i : i + options.batch] for i in range(0, len(requests), options.batch)]
    print("warming up ...", file=sys.stderr)
    generate(model, device, batches[0])
    facts = {
        "name": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        seconds = sum(generate(model, device, each) for each in batches)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
