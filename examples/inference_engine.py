"""Trains on losses from workers: processes elsewhere that may start late, be slow, die and come back.

python inference_engine.py OUT                               # prints its address
python inference_worker.py http://127.0.0.1:8765             # any number of them, at any time

Workers get the base and the trajectory of the run over HTTP and replay it, so all have the same weights. Each
probe is sent as (seed, coefficient) pairs or, with --adapters, as a LoRA adapter.
"""

import argparse
import json
import math
import threading
import time
import uuid
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import zoext
from zoext.trajectory import NOISE_FIELD, weights_digest

LARGEST_ANSWER = 2**16  # bytes
COMPARE_EVERY = 50  # steps after which a worker must again prove that it has the weights of the run


class Board:
    """The probes of the open round. The threads of the server lease them to workers and take the losses."""

    def __init__(self, out: Path, optimizer: zoext.ZerothOrderOptimizer, timeout: float) -> None:
        self.base, self.path = out / "base", out / "run.jsonl"
        self.files = sorted(file.name for file in self.base.iterdir())
        self.run = {"run": uuid.uuid4().hex, "noise_field": NOISE_FIELD}
        self.optimizer, self.timeout = optimizer, timeout
        self.changed = threading.Condition()
        self.place: dict = {}  # the step, and how far the trajectory goes
        self.orders: list[dict] = []  # the probes of the open round
        self.leases: dict[int, float] = {}  # until when a probe is left to the worker that has it
        self.losses: dict[int, float] = {}
        self.compared: set[str] = set()  # workers whose weights are known to be those of the run
        self.refused: dict[str, str] = {}  # workers with other weights, and why they get no more probes
        self.digest = ""
        self.end: dict = {}
        self.left: set[str] = set()  # workers that know that the run is over

    def begin_step(self, step: int) -> None:
        """The trajectory is on the disk up to ``step``."""
        lines = self.path.read_bytes()
        checksum = json.loads(lines.splitlines()[-1])["crc32"]
        with self.changed:
            self.place = {"step": step, "recorded": len(lines), "checksum": checksum}
            self.digest = ""
            if step % COMPARE_EVERY == 0:
                self.compared.clear()

    def evaluate(self, orders: list[dict]) -> torch.Tensor:
        """Returns the losses of a round once workers have computed all of them."""
        with self.changed:
            self.leases, self.losses = {}, {}
            self.orders = [self.run | self.place | order for order in orders]
            self.changed.notify_all()
            while not self.changed.wait_for(lambda: len(self.losses) == len(orders), self.timeout):
                print(f"step {self.place['step']}: {len(self.losses)} of {len(orders)} losses", flush=True)
            self.orders = []
            return torch.tensor([self.losses[probe] for probe in range(len(orders))])

    def free(self) -> list[int]:
        """The probes without a loss that no worker has, or that one has had for too long."""
        without = set(range(len(self.orders))) - self.losses.keys()
        return sorted(probe for probe in without if self.leases.get(probe, 0.0) <= time.monotonic())

    def lease(self, worker: str) -> dict:
        """The order of a free probe; empty if there is none for a second."""
        with self.changed:
            if worker in self.refused:
                return {"error": self.refused[worker]}
            self.changed.wait_for(lambda: self.end or self.free(), 1)
            if self.end:
                return self.end
            for probe in self.free():
                self.leases[probe] = time.monotonic() + self.timeout
                return self.orders[probe] | {"compare": worker not in self.compared}
            return {}

    def take(self, answer: dict) -> str:
        """Takes a loss, or tells why not: only that of an open probe at the weights of the run counts."""
        loss, probe, worker = (answer.get(name) for name in ("loss", "probe", "worker"))
        if type(probe) is not int or type(loss) not in (float, type(None)) or type(worker) is not str:
            return "probe must be an integer, loss a float or null, and worker a string"
        with self.changed:
            if not 0 <= probe < len(self.orders) or probe in self.losses:
                return f"probe {probe} is not open"
            order = self.orders[probe]
            for name in ("run", "noise_field", "step", "round", "checksum"):
                if answer.get(name) != order[name]:
                    return f"{name} is {order[name]}, not {answer.get(name)}"
            if worker not in self.compared:
                self.digest = self.digest or weights_digest(self.optimizer)  # nothing moves in a round
                if answer.get("digest") != self.digest:
                    self.refused[worker] = f"its weights are not those of step {order['step']} of the run"
                    self.leases.pop(probe, None)
                    self.changed.notify_all()
                    return self.refused[worker]
                self.compared.add(worker)
            self.losses[probe] = math.nan if loss is None else loss
            self.changed.notify_all()
            return ""

    def finish(self) -> None:
        """Tells the workers that the run is over."""
        with self.changed:
            self.end = self.run | self.place | {"done": True, "digest": weights_digest(self.optimizer)}
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.compared <= self.left, self.timeout)

    def leave(self, worker: str) -> None:
        with self.changed:
            self.left.add(worker)
            self.changed.notify_all()


class Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds; a client that stalls is cut off
    board: Board

    def do_GET(self) -> None:
        board = self.board
        match self.path.strip("/").split("/"):
            case ["run"]:
                self.reply(200, board.run | board.place | {"files": board.files})
            case ["base", name] if name in board.files:
                self.reply(200, (board.base / name).read_bytes())
            case ["trajectory", first, end] if first.isdecimal() and end.isdecimal():
                self.reply(200, board.path.read_bytes()[int(first) : int(end)])
            case ["probe", worker]:
                self.reply(200, board.lease(worker))
            case ["leave", worker]:
                board.leave(worker)
                self.reply(200, {})
            case _:
                self.reply(404, {"error": "no such page"})

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > LARGEST_ANSWER:
            return self.reply(413, {"error": f"an answer has at most {LARGEST_ANSWER} bytes"})
        try:
            answer = json.loads(self.rfile.read(int(size)))
        except (ValueError, RecursionError):
            answer = None
        error = self.board.take(answer) if isinstance(answer, dict) else "an answer is an object of JSON"
        return self.reply(409 if error else 200, {"error": error})

    def reply(self, status: int, content: dict | bytes) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def adapter_of(factors: dict[str, zoext.LoRAFactors]) -> str:
    """The adapter_model.safetensors of PEFT; ``B`` includes mu, so it is for lora_alpha = r. In base64."""
    state = {}
    for name, (A, B) in factors.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        state |= {f"{module}.lora_A.weight": A.contiguous(), f"{module}.lora_B.weight": B.contiguous()}
    return b64encode(save(state)).decode()


def model_of(folder: str | None) -> PreTrainedModel:
    """A model of transformers, or a tiny random one."""
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=32, **sizes)).eval()


def optimizer_of(model: PreTrainedModel, adapters: bool) -> zoext.ZerothOrderOptimizer:
    """Trains everything along dense directions, or the projections along low-rank ones."""
    named = [(n, p) for n, p in model.named_parameters() if not adapters or n.endswith("_proj.weight")]
    return zoext.ZerothOrderOptimizer(
        named,
        direction=zoext.LowRank(rank=3) if adapters else zoext.Gaussian(),
        estimator=zoext.GreedyPool(pool_size=4),
        probe=zoext.StreamedProbe(model),
        nonfinite="skip",
        lr=1e-3,
        mu=1e-2,
    )


def batch_of(step: int) -> torch.Tensor:
    """Token ids; your data comes here."""
    half = torch.randint(32, (8, 6), generator=torch.Generator().manual_seed(step))
    return torch.cat((half, half), 1)


@contextmanager
def serving(board: Board, host: str, port: int) -> Iterator[None]:
    server = ThreadingHTTPServer((host, port), type("BoardHandler", (Handler,), {"board": board}))
    print(f"http://{host}:{server.server_port}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with server:
        try:
            yield
        finally:
            server.shutdown()


def orders_of(round: zoext.OpenRound, adapters: bool) -> Iterator[dict]:
    seeds = round.seeds.tolist()
    for probe, row in enumerate(round.coefficients.tolist()):
        pairs = [(seed, c) for seed, c in zip(seeds, row, strict=True) if c]
        sent = {"lora": adapter_of(round.adapter(probe))} if adapters else {"pairs": pairs}
        yield {"probe": probe} | sent


def train(board: Board, steps: int, adapters: bool, host: str, port: int) -> None:
    optimizer = board.optimizer
    with zoext.Trajectory(board.path, optimizer, notes=board.run) as trajectory:
        board.begin_step(0)
        with serving(board, host, port):
            for step in range(steps):
                shared = {"tokens": batch_of(step).tolist(), "mu": [g["mu"] for g in optimizer.param_groups]}
                number, round = 0, optimizer.ask()
                while round is not None:
                    orders = [shared | {"round": number} | order for order in orders_of(round, adapters)]
                    number, round = number + 1, optimizer.tell(board.evaluate(orders))
                print(f"step {step + 1}: loss {optimizer.step():.4f}", flush=True)
                trajectory.flush()
                board.begin_step(step + 1)
            board.finish()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="a folder of transformers; default: a tiny random model")
    parser.add_argument("--adapters", action="store_true", help="send probes as LoRA adapters")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=30, help="seconds until a probe is given to another")
    parser.add_argument("--host", default="127.0.0.1", help="nothing authenticates the workers")
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args(arguments)
    model = model_of(args.model)
    model.save_pretrained(args.out / "base")
    board = Board(args.out, optimizer_of(model, args.adapters), args.timeout)
    train(board, args.steps, args.adapters, args.host, args.port)
    model.save_pretrained(args.out / "tuned")
    print(f"step {args.steps}: weights {board.end['digest']}")


if __name__ == "__main__":
    main()
