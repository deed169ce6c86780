"""A reader of patched checkpoints, written from docs/reference/checkpoint-format.md alone."""

import json
from functools import reduce
from itertools import product

import numpy as np
import safetensors


def prime_power(q):
    p = next((p for p in range(2, q + 1) if q % p == 0), 1)
    return next(((p, n) for n in range(1, 15) if p > 1 and p**n == q), None)


def is_paley(m):
    return m % 4 == 0 and (prime_power(m - 1) or ((m // 2 - 1) % 4 == 1 and prime_power(m // 2 - 1)))


def split(m):
    splits = ([a, *split(m // a)] for a in range(4, int(m**0.5) + 1) if m % a == 0 and is_paley(a) and split(m // a))
    return [m] if is_paley(m) else next(splits, [])


def characters(p, n):
    for rule in product(range(p), repeat=n):
        chi, power = np.zeros(p**n), [1] + [0] * (n - 1)
        for i in range(p**n - 1):
            chi[sum(c * p**j for j, c in enumerate(power))] = (-1) ** i
            power = [(c + power[-1] * r) % p for c, r in zip([0, *power[:-1]], rule, strict=True)]
        if chi[0] == 0 and np.count_nonzero(chi) == p**n - 1:
            return chi


def paley(m):
    p, n = prime_power(m - 1) or prime_power(m // 2 - 1)
    first, elements = p**n == m - 1, np.arange(p**n)[:, None] // p ** np.arange(n) % p
    c = np.ones((p**n + 1, p**n + 1))
    c[1:, 1:] = characters(p, n)[(elements[:, None] - elements) % p @ p ** np.arange(n)]
    c[1:, 0] = -1 if first else 1
    np.fill_diagonal(c, 1 if first else 0)
    return c if first else np.kron(c, [[1, 1], [1, -1]]) + np.kron(np.eye(len(c)), [[1, -1], [-1, -1]])


def hadamard(d):
    t = (d & -d).bit_length() - 1
    orders = ((p << s, t - s) for p in range(d >> t, 1, -1) if (d >> t) % p == 0 for s in range(2, t + 1))
    m, k = next(((m, k) for m, k in orders if m <= 16384 and split(m)), (1, t))
    block = reduce(np.kron, [*map(paley, split(m)), *[[[1, 1], [1, -1]]] * k], np.eye(1))
    return np.kron(np.eye(d // len(block)), block) / len(block) ** 0.5, len(block)


def matrix(patch, w):
    d, rest = patch["dim"], w["down"] @ w["up"] if patch.get("rank", 0) else 0
    if patch["kind"] == "hadamard" or patch.get("hadamard", False):
        h, order = hadamard(d)
        assert patch.get("order", order) == order
        return w.get("pre_scale", np.ones(d))[:, None] * (h * w["scale"] @ h.T) * w.get("post_scale", 1) + rest
    kinds = {"dense": 0, "diagonal": np.diag(w.get("scale", [])), "low-rank": np.eye(d) + rest, "norm-linear": rest}
    return w.get("weight", kinds[patch["kind"]])


def after(x, patch):
    root = np.sqrt((x**2).mean(-1, keepdims=True) + patch[0].get("eps", 1e-6))
    return x + x / root @ matrix(*patch) if patch[0]["kind"] == "norm-linear" else x @ matrix(*patch)


def array(one):
    bits = np.frombuffer(one["data"], {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[one["dtype"]]).reshape(one["shape"])
    return ((bits.astype("<u4") << 16).view("<f4") if one["dtype"] == "BF16" else bits).astype(float)


def read(directory):
    config, files = json.loads((directory / "config.json").read_text()), directory.glob("*.safetensors")
    state = {name: array(one) for file in files for name, one in safetensors.deserialize(file.read_bytes())}
    record, depth = config["linearpatch"], config["num_hidden_layers"]
    assert record["format"] == 2
    for joint, patches in record["joints"].items():
        at = f"model.layers.{joint}.patch." if int(joint) < depth else f"model.layers.{depth - 1}.output_patch."
        own = [{n.split(".")[-1]: state[n] for n in state if n.startswith(f"{at}{i}.")} for i in range(len(patches))]
        yield int(joint), list(zip(patches, own, strict=True))
