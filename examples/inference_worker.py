"""Computes losses for inference_engine.py: python inference_worker.py http://127.0.0.1:8765 [--model MODEL]

Without --model it takes the base of the run from there. It replays the trajectory of the run to have the same
weights at every step, so it may start at any time. Transformers computes the losses here; an engine such as
vLLM or SGLang takes the place of ``loss_of``.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from base64 import b64decode
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import peft
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM, PreTrainedModel

import zoext
from zoext.trajectory import NOISE_FIELD, weights_digest

PATIENCE = 30  # seconds without the other process after which a worker gives up


class Client:
    """Requests to the process that trains, which are repeated while it cannot be reached."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, path: str, data: bytes | None = None) -> bytes:
        give_up = time.monotonic() + PATIENCE
        while True:
            try:
                with urlopen(Request(self.url + path, data), timeout=PATIENCE) as reply:
                    return reply.read()
            except HTTPError as error:
                return error.read()
            except (URLError, ConnectionError, TimeoutError):
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.5)

    def json(self, path: str, data: dict | None = None) -> dict:
        return json.loads(self.get(path, None if data is None else json.dumps(data).encode()))

    def append_trajectory(self, file: Path, end: int) -> None:
        """Gets what is missing of the first ``end`` bytes."""
        have = file.stat().st_size if file.exists() else 0
        if have < end:
            with file.open("ab") as out:
                out.write(self.get(f"/trajectory/{have}/{end}"))


def loss_of(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    return model(input_ids=tokens, labels=tokens).loss.item()


def loss_of_pairs(model: PreTrainedModel, optimizer: zoext.ZerothOrderOptimizer, order: dict) -> float:
    """The loss at ``theta + mu * sum_k c_k D(s_k)``, for pairs of s_k and c_k."""
    for group, mu in zip(optimizer.param_groups, order["mu"], strict=True):
        group["mu"] = mu
    seeds, coefficients = [s for s, _ in order["pairs"]], [c for _, c in order["pairs"]]
    with optimizer.displaced(seeds, coefficients):
        return loss_of(model, torch.tensor(order["tokens"]))


def loss_of_adapter(model: PreTrainedModel, order: dict, folder: Path) -> float:
    """The loss with an adapter that is loaded from files, as engines do."""
    content, tokens = b64decode(order["lora"]), torch.tensor(order["tokens"])
    state = load(content)
    with torch.no_grad():
        if not state:  # a probe at theta
            return loss_of(model, tokens)
        layers = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
        r = len(state[f"{layers[0]}.lora_A.weight"])
        modules = [layer.removeprefix("base_model.model.") for layer in layers]
        # The factors are complete: lora_alpha = r makes the scale 1. It is applied here and nowhere else.
        peft.LoraConfig(r=r, lora_alpha=r, target_modules=modules).save_pretrained(folder)
        (folder / "adapter_model.safetensors").write_bytes(content)
        adapted = peft.PeftModel.from_pretrained(model, folder)
        try:
            return loss_of(adapted, tokens)
        finally:
            adapted.unload()


def work(client: Client, worker: str, folder: Path, base: str | None) -> str:
    """Computes losses until the run is over; returns the digest of its weights."""
    run = client.json("/run")
    if run["noise_field"] != NOISE_FIELD:
        raise ValueError(f"the run has noise field {run['noise_field']}, this zoext has {NOISE_FIELD}")
    if base is None:
        (folder / "base").mkdir()
        for name in run["files"]:
            (folder / "base" / name).write_bytes(client.get(f"/base/{name}"))
    model = AutoModelForCausalLM.from_pretrained(base or folder / "base").eval()
    client.append_trajectory(folder / "run.jsonl", run["recorded"])
    follower = zoext.Follower(model, folder / "run.jsonl")  # refuses another base
    while True:
        order = client.json(f"/probe/{worker}")
        if not order:
            continue
        if "error" in order:
            raise ValueError(order["error"])
        if order["run"] != run["run"]:
            raise ValueError(f"{client.url} has begun another run; start this worker again")
        client.append_trajectory(folder / "run.jsonl", order["recorded"])
        follower.catch_up()
        if (follower.step, follower.checksum) != (order["step"], order["checksum"]):
            raise ValueError(f"replayed to step {follower.step}, but the run is at step {order['step']}")
        if "done" in order:
            if weights_digest(follower.optimizer) != order["digest"]:
                raise ValueError(f"the weights are not those of step {order['step']} of the run")
            client.get(f"/leave/{worker}")
            return order["digest"]
        if "lora" in order:
            loss = loss_of_adapter(model, order, folder)
        else:
            loss = loss_of_pairs(model, follower.optimizer, order)
        answer = {name: order[name] for name in ("run", "step", "round", "probe")}
        answer |= {"noise_field": NOISE_FIELD, "checksum": follower.checksum, "worker": worker}
        answer |= {"loss": loss if math.isfinite(loss) else None}
        answer |= {"digest": weights_digest(follower.optimizer)} if order["compare"] else {}
        if error := client.json("/loss", answer)["error"]:
            print(f"{worker}: not taken: {error}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--model", help="a folder with the base of the run")
    args = parser.parse_args(arguments)
    worker = f"{os.uname().nodename}-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            digest = work(Client(args.url), worker, Path(folder), args.model)
        except (ValueError, OSError) as error:  # a TrajectoryError is a ValueError
            sys.exit(f"{worker}: {error}")
    print(f"{worker}: weights {digest}")


if __name__ == "__main__":
    main()
