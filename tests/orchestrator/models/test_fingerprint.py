"""The digest of a live object changes with everything that decides its numbers, and with nothing else."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.models._fingerprint import Fingerprint

COMMON = """
import functools, math
import numpy as np
import torch
from torch import nn

torch.manual_seed(0)
scale = 2.0
table = np.arange(4.0)

def helper(x):
    return x * scale

class Net(nn.Module):
    rate = 3

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2), persistent=False)
        self.gain = 1.5

    def forward(self, x, t):
        return self.layer(x) * self.gain * self.rate + self.mean

net = Net()

def make(factor):
    def inner(x, t, shift=1.0):
        return net(helper(x), t) * factor + shift + float(table[0]) + (lambda: 7)()
    return inner

velocity = make(0.5)
"""


def namespace(source: str = COMMON) -> dict[str, Any]:
    """The globals of code that was typed into a notebook."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<cell>", "exec"), names)
    return names


def digest_of(source: str = COMMON) -> str:
    return Fingerprint.of(namespace(source)["velocity"]).digest


def test_equal_code_and_weights_have_one_digest_in_every_process(tmp_path: Path) -> None:
    """So a notebook that is started again finds the pairs that it made; comments and line numbers do not count."""
    commented = "# a comment\n\n" + COMMON.replace("    return x * scale", "    # another\n    return x * scale")
    assert digest_of() == digest_of(commented)
    script = tmp_path / "script.py"
    script.write_text(COMMON + "\nfrom orchestrator.models._fingerprint import Fingerprint as F\n"
                      "print(F.of(velocity).digest)\n")  # fmt: skip
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest_of()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scale = 2.0", "scale = 2.1"),
        ("np.arange(4.0)", "np.arange(5.0)"),
        ("return x * scale", "return scale + x"),
        ("rate = 3", "rate = 4"),
        ("self.gain = 1.5", "self.gain = 1.25"),
        ("torch.zeros(2)", "torch.ones(2)"),
        ("manual_seed(0)", "manual_seed(1)"),
        ("self.layer(x) *", "self.layer(x) /"),
        ("make(0.5)", "make(0.25)"),
        ("shift=1.0", "shift=2.0"),
        ("(lambda: 7)", "(lambda: 8)"),
    ],
    ids=str,
)
def test_the_digest_changes_with_everything_that_decides_the_velocity(old: str, new: str) -> None:
    """Globals, code that is called, class and instance attributes, buffers, weights, closures, defaults, constants."""
    assert old in COMMON
    assert digest_of() != digest_of(COMMON.replace(old, new))


def test_modes_and_gradients_of_a_module_do_not_count() -> None:
    """A command freezes it while it runs."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    before = Fingerprint.of(net).digest
    net.eval().requires_grad_(False)
    assert Fingerprint.of(net).digest == before


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net[0].weight.data.add_(1e-3),
        lambda net: net[0].bias.data.zero_(),
        lambda net: net.append(nn.ReLU()),
        lambda net: setattr(net, "temperature", 2.0),
        lambda net: net.register_forward_hook(lambda module, inputs, output: output * 2),
    ],
    ids=["weight", "bias", "layer", "attribute", "hook"],
)
def test_a_module_that_is_changed_in_place_has_another_digest(change: Callable[[Any], Any]) -> None:
    """A weight, a layer, an attribute, a hook; the fingerprint names the part."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2))
    before = Fingerprint.of(net)
    change(net)
    after = Fingerprint.of(net)
    assert after.digest != before.digest
    assert after.changed(before)


def test_networks_are_found_wherever_a_function_refers_to_them() -> None:
    """In closures, globals, partial arguments, bound methods, decorators, and what torch.compile made of one."""
    net = nn.Linear(2, 2)

    class Wrapper:
        def __init__(self) -> None:
            self.net = net

        def velocity(self, x: Any, t: Any) -> Any:
            return self.net(x)

    def called(x: Any, t: Any, module: nn.Module) -> Any:
        return module(x)

    functions = [
        lambda x, t: net(x),
        functools.partial(called, module=net),
        Wrapper().velocity,
        torch.no_grad()(Wrapper().velocity),
        functools.lru_cache(lambda x, t: net(x)),
        torch.compile(net),
    ]
    for function in functions:
        assert Fingerprint.networks_of(function) == [net], function
    assert Fingerprint.networks_of(namespace()["velocity"])[0].gain == 1.5


def test_scripted_networks_are_digested_with_their_code() -> None:
    """TorchScript has no Python code; its archive counts."""
    net = nn.Linear(2, 2)
    traced = [torch.jit.trace(part, torch.zeros(1, 2)) for part in (net, nn.Sequential(net, nn.ReLU()))]
    first, second = (Fingerprint.of(part).digest for part in traced)
    assert first != second
    assert first == Fingerprint.of(traced[0]).digest


def test_what_cannot_be_digested_is_named() -> None:
    """A lock, a file, or an array of objects may hold anything."""
    lock = threading.Lock()
    parts = {"lock": lock, "objects": np.array([lock], dtype=object), "rest": [1, "a", {2.0}, None]}
    print_ = Fingerprint.of(lambda x, t: parts)
    assert sorted(print_.unknown) == [".parts['lock']", ".parts['objects']"]
    assert print_.unknown[".parts['lock']"] == "_thread.lock"


def test_objects_with_state_are_digested_by_it() -> None:
    """Dataclasses, slots, random generators, classes that refer to themselves."""
    generator = np.random.default_rng(0)
    before = Fingerprint.of(generator)
    assert not before.unknown
    generator.standard_normal()
    assert Fingerprint.of(generator).digest != before.digest
    cyclic = types.SimpleNamespace(value=1)
    cyclic.itself = cyclic
    one = Fingerprint.of(cyclic).digest
    cyclic.value = 2
    assert Fingerprint.of(cyclic).digest != one


def test_what_modules_of_the_user_hold_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``import helpers`` in a notebook: the attributes that the function uses, and no others."""
    (tmp_path / "fingerprinted_helpers.py").write_text("used = 1\nunused = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = "import fingerprinted_helpers as h\ndef velocity(x, t):\n    return x * h.used\n"
    names = namespace(source)
    before = Fingerprint.of(names["velocity"]).digest
    names["h"].unused = 2
    assert Fingerprint.of(names["velocity"]).digest == before
    names["h"].used = 2
    assert Fingerprint.of(names["velocity"]).digest != before
