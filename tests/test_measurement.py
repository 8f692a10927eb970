"""Measuring: counts from stored outcomes, clusters, further looks at undecided strata, the most frequent answer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from medbridge.config import RunSettings
from medbridge.data import ImageCache, Item, Outcome, permutation
from medbridge.errors import MedbridgeError
from medbridge.ledger import Ledger, Stage
from medbridge.measurement import (
    by_stratum,
    cluster_of,
    frequent_answer_baseline,
    measurement_request,
    run_measurement,
    summarise_sampling,
    tally_items,
)
from medbridge.measurement.validity import gather, invalid_strata
from medbridge.model import Policy
from medbridge.progress import Reporter
from medbridge.rollout import (
    GREEDY,
    EngineFailure,
    FailureSettings,
    Graded,
    Pool,
    Request,
    Rollout,
    SamplingSettings,
    TransformersEngine,
)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "run.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def reporter(tmp_path: Path) -> Iterator[Reporter]:
    with (tmp_path / "log").open("w") as log:
        yield Reporter(Console(file=log))


def begin(ledger: Ledger) -> Stage:
    return ledger.begin_stage(round=0, kind="diagnose", model="m", strata=[], plan={})


def entry(
    item_id: str, sample: int, status: str, option: int | None = None, answer: str | None = None,
    order: tuple[int, ...] = (0, 1),
) -> Graded:  # fmt: skip
    tokens = np.array([1, 2, 3], dtype=np.int32)
    reason = "length" if status == "abstain" else "stop"
    rollout = Rollout(item_id, sample, order, "...", tokens, np.zeros(3, np.float32), reason, 9)  # type: ignore[arg-type]
    return Graded(rollout, Outcome(status, option, answer, None, False))  # type: ignore[arg-type]


def items_of(names: Iterable[str], split: str = "validation", **changes: Any) -> list[Item]:
    values: dict[str, Any] = {
        "dataset": "d", "split": split, "question": "Which?", "answer": "yes", "options": ("yes", "no"), "images": (),
        "tags": {}, "floor": 0.5, **changes,
    }  # fmt: skip
    return [Item(id=f"d/{split}/{name}", **values) for name in names]


# -- tallies -------------------------------------------------------------------------------------------------------


def test_tallies_count_what_is_stored(ledger: Ledger) -> None:
    stage = begin(ledger)
    a, b, c, d = items_of("abcd")
    ledger.save_rollouts(
        stage.stage_id,
        0,
        [
            entry(a.id, GREEDY, "wrong", 1, "no"),
            entry(a.id, 0, "correct", 0, "yes"),
            entry(a.id, 1, "correct", 0, "yes"),
            entry(a.id, 2, "wrong", 1, "no"),
            entry(a.id, 3, "abstain"),
            entry(b.id, 0, "abstain"),
            entry(c.id, GREEDY, "correct", None, "Left Lung"),
            entry(c.id, 0, "correct", None, "left lung."),
            entry(c.id, 1, "wrong", None, None),
        ],
    )
    found = tally_items(ledger, stage.stage_id, [c, a, b, d], [])
    assert [tally.item_id for tally in found] == [c.id, a.id, b.id, d.id]
    by_id = {tally.item_id: tally for tally in found}
    first = by_id[a.id]
    assert (first.n, first.c, first.abstained, first.greedy_correct) == (4, 2, 1, False)
    assert dict(first.votes) == {"0": 2, "1": 1}
    assert (by_id[b.id].n, by_id[b.id].c, by_id[b.id].abstained, by_id[b.id].greedy_correct) == (1, 0, 1, None)
    assert dict(by_id[b.id].votes) == {}
    assert (by_id[c.id].greedy_correct, by_id[c.id].n, by_id[c.id].c) == (True, 2, 1)
    assert by_id[d.id].n == 0 and by_id[d.id].greedy_correct is None
    assert {tally.floor for tally in found} == {0.5}


def test_clusters_are_tags_or_shared_images() -> None:
    one, two = items_of("ab", images=("/x/1.png",), tags={"patient": "P1", "slice": "3"})
    [other] = items_of("c", images=("/x/2.png",), tags={"slice": "3"})
    [bare] = items_of("e")
    assert cluster_of(one, []) == cluster_of(two, []) != cluster_of(other, [])
    assert cluster_of(bare, []) == bare.id
    assert cluster_of(one, ["slice"]) == cluster_of(other, ["slice"])
    assert cluster_of(one, ["patient", "slice"]) == cluster_of(two, ["patient", "slice"])
    assert cluster_of(other, ["patient"]) not in (cluster_of(one, ["patient"]), cluster_of(bare, ["patient"]))


def test_strata_are_sorted_and_their_items_in_a_seeded_order(tiny_items: list[Item]) -> None:
    strata = by_stratum(tiny_items, ["task"], seed=0)
    assert list(strata) == ["shade", "side"]
    assert {item.id for items in strata.values() for item in items} == {item.id for item in tiny_items}
    assert by_stratum(tiny_items[::-1], ["task"], seed=0) == strata
    assert by_stratum(tiny_items, ["task"], seed=1) != strata
    assert list(by_stratum(tiny_items, [], seed=0)) == ["squares"]


def test_a_request_has_one_greedy_and_the_wanted_samples_each_with_its_own_order(tiny_items: list[Item]) -> None:
    item = tiny_items[0]
    request = measurement_request(item, 5, seed=3)
    assert request.samples == (GREEDY, 0, 1, 2, 3, 4)
    assert request.permutations == tuple(permutation(item, 3, number) for number in request.samples)


# -- looks ---------------------------------------------------------------------------------------------------------


class Case:
    """A measuring stage whose outcomes are stored beforehand, so that the looks can be followed."""

    def __init__(self, ledger: Ledger, engine: TransformersEngine, reporter: Reporter, settings: Any) -> None:
        self.ledger, self.engine, self.reporter, self.settings = ledger, engine, reporter, settings
        self.stage = begin(ledger)

    def store(self, items: Sequence[Item], correct: Callable[[int], int], samples: int = 4) -> None:
        """Of the samples of the i-th item, `correct(i)` are right; it counts as greedily right if most are."""
        for index, item in enumerate(items):
            right = correct(index)
            rows = [entry(item.id, GREEDY, "correct" if 2 * right > samples else "wrong", 0, "x", ())]
            rows += [entry(item.id, n, "correct" if n < right else "wrong", 0, "x", ()) for n in range(samples)]
            self.ledger.save_rollouts(self.stage.stage_id, 0, rows)

    def measure(self, strata: dict[str, list[Item]], *, limit: int | None = None, **sections: Any) -> dict[str, Any]:
        settings = self.settings(**sections)
        rows = run_measurement(
            self.ledger, self.stage, self.engine, strata, settings, self.reporter,
            limit=limit, sequential=settings.diagnosis.sequential, at_least=sections.get("at_least", ()),
        )  # fmt: skip
        return {row.stratum: row for row in rows}


@pytest.fixture
def case(
    ledger: Ledger,
    reporter: Reporter,
    load_policy: Callable[..., Policy],
    images: ImageCache,
    tiny_settings: Callable[..., RunSettings],
) -> Case:
    policy = load_policy()
    engine = TransformersEngine(policy, tiny_settings().data.prompt, images, batch_size=64)
    return Case(ledger, engine, reporter, tiny_settings)


def pool(stratum: str, count: int, per_image: int = 1) -> list[Item]:
    return [
        dataclasses.replace(item, options=None, floor=0.0, images=(f"/{stratum}/{index // per_image}.png",))
        for index, item in enumerate(items_of(f"{stratum}{n}" for n in range(count)))
    ]


LOOK: dict[str, Any] = {
    "diagnosis": {"items_per_look": 8},
    "gate": {"min_items": 4, "alpha": 0.06, "accuracy_target": 0.5, "error_control": "none"},
}


def test_a_settled_stratum_stops_and_an_open_one_goes_on_to_its_end(case: Case) -> None:
    weak, open_, strong = pool("weak", 60), pool("open", 60), pool("strong", 60)
    case.store(weak, lambda i: 0)
    case.store(open_, lambda i: 4 * (i % 2))  # half of the items are within reach: just at the threshold of 0.5
    case.store(strong, lambda i: 4)
    rows = case.measure({"weak": weak, "open": open_, "strong": strong}, **LOOK)
    assert {name: row.kind for name, row in rows.items()} == {"weak": "bridge", "open": "undecided", "strong": "done"}
    items = {name: row.support["items"] for name, row in rows.items()}
    # 0.97 ** n of e-values of 1 / 0.03: six items in a row are enough for support, and a few looks for everything
    assert items == {"weak": 8, "open": 60, "strong": 8}
    assert len(case.ledger.tallies(case.stage.stage_id)) == sum(items.values())
    assert case.engine.policy._cache_bytes == 0  # all outcomes were there: nothing was sampled
    assert rows["weak"].verdict["evidence"]["e_below"] >= 1 / 0.03
    assert rows["open"].verdict["more"]["bottleneck"] == "items"


def test_where_only_accuracy_is_open_one_greedy_completion_an_item_is_drawn(
    case: Case, train_items: list[Item], formed: Path, images: ImageCache
) -> None:
    """Support is sure after the first look, Acc@1 is right at its target: what follows is asked greedily only."""
    items = [dataclasses.replace(item, id=f"{item.id}/{copy}") for copy in range(3) for item in train_items]
    by_tag = {**LOOK, "diagnosis": {"items_per_look": 16, "cluster": ["n"]}}
    settings = case.settings(**by_tag)
    case.engine = TransformersEngine(
        Policy.load(str(formed), settings.model), settings.data.prompt, images, batch_size=64
    )
    spread = [dataclasses.replace(item, tags={"n": str(n)}) for n, item in enumerate(items)]
    rows = []
    for number, item in enumerate(spread[:16]):
        request = measurement_request(item, 4, settings.seed)
        for sample, order in zip(request.samples, request.permutations, strict=True):
            right = sample != GREEDY or number % 2 == 0
            rows.append(entry(item.id, sample, "correct" if right else "wrong", 0, "x", order))
    case.ledger.save_rollouts(case.stage.stage_id, 0, rows)
    found = case.measure({"all": spread}, **by_tag)["all"]
    sampled = case.ledger.sampled(case.stage.stage_id)
    asked = case.ledger.asked(case.stage.stage_id)
    assert set(sampled) == {item.id for item in spread[:16]}
    assert len(asked) > 16  # and the rest by one greedy completion each
    assert found.support["items"] == 16 and found.support["greedy_items"] == len(asked)
    before = case.ledger.count("rollouts")
    again = case.measure({"all": spread}, **by_tag)["all"]
    assert (again.kind, again.support, again.verdict) == (found.kind, found.support, found.verdict)
    assert case.ledger.count("rollouts") == before
    assert invalid_strata(case.ledger, case.stage, {"all": spread[: len(asked)]}, case.settings(**by_tag)) == {}


def test_a_finite_split_is_settled_when_all_of_it_was_measured(case: Case) -> None:
    items = pool("near", 40)
    case.store(items, lambda i: 4 * (i * 7 % 20 < 9))  # 0.45 of the items: too near to 0.5 to say of others like them
    assert case.measure({"near": items}, **LOOK)["near"].kind == "undecided"
    found = case.measure({"near": items}, **{**LOOK, "diagnosis": {"items_per_look": 8, "finite": True}})["near"]
    assert found.kind == "bridge" and found.support["items"] <= 40


def test_one_look_measures_everything(case: Case) -> None:
    weak = pool("weak", 40)
    case.store(weak, lambda i: 0)
    sections = {**LOOK, "diagnosis": {"sequential": False}}
    assert case.measure({"weak": weak}, **sections)["weak"].support["items"] == 40
    assert case.measure({"weak": weak}, limit=12, **sections)["weak"].support["items"] == 12


def test_clusters_are_taken_whole_and_asked_items_in_any_case(case: Case, tiny_settings: Any) -> None:
    weak = pool("weak", 45, per_image=3)
    case.store(weak, lambda i: 0)
    rows = case.measure({"weak": weak}, **LOOK)
    assert rows["weak"].support["items"] % 3 == 0 and rows["weak"].support["items"] < 45
    again = run_measurement(
        case.ledger, case.stage, case.engine, {"weak": weak}, tiny_settings(**LOOK), case.reporter,
        sequential=True, at_least={weak[-4].id},
    )  # fmt: skip
    assert again[0].support["items"] == 42  # the cluster of that item, and all before it


def test_a_stratum_with_few_items_ends_undecided(case: Case) -> None:
    few = pool("few", 3)
    case.store(few, lambda i: 4)
    assert case.measure({"few": few}, **LOOK)["few"].kind == "undecided"


def test_a_measurement_that_cannot_be_trusted_gives_no_verdict(case: Case) -> None:
    weak = pool("weak", 20)
    case.store(weak, lambda i: 0)
    for item in weak:
        case.ledger._db.execute(
            "UPDATE outcomes SET status = 'abstain' WHERE rollout_id IN "
            "(SELECT rollout_id FROM rollouts WHERE item_id = ?)", (item.id,),
        )  # fmt: skip
    row = case.measure({"weak": weak}, **LOOK, guard={"max_abstained": 0.5})["weak"]
    assert row.kind == "undecided"
    assert "can't be trusted" in row.reason and "100% of the samples give no readable answer" in row.reason


def test_the_facts_that_the_guard_checks_are_counted_from_the_ledger(
    case: Case, tiny_items: list[Item], tiny_settings: Any
) -> None:
    strata = by_stratum([item for item in tiny_items if item.split == "validation"], ["task"], seed=0)
    settings = tiny_settings()
    case.measure(strata)
    facts = gather(case.ledger, case.stage, strata["shade"], settings)
    assert (facts.items, facts.samples, facts.miscounted, facts.misordered) == (6, 4, 0, 0)
    assert facts.images_asked == facts.images_fed == 6 * 4
    assert 0 < facts.longest <= facts.max_new_tokens == 8
    assert facts.repeats.items == facts.repeats.known == 6 and facts.repeats.samples == 24
    case.ledger._db.execute("UPDATE rollouts SET images = 0 WHERE sample = 1")
    case.ledger._db.execute("UPDATE rollouts SET permutation = '[2,1,0]' WHERE sample = 2")
    case.ledger._db.execute(
        "DELETE FROM outcomes WHERE rollout_id IN (SELECT rollout_id FROM rollouts WHERE sample = 3)"
    )
    case.ledger._db.execute("DELETE FROM rollouts WHERE sample = 3")
    broken = gather(case.ledger, case.stage, strata["shade"], settings)
    assert broken.miscounted == 6 and broken.images_fed == broken.images_asked - 6 and broken.misordered > 0
    reasons = invalid_strata(case.ledger, case.stage, strata, settings)["shade"]
    assert "complete the sampling" in reasons and "images" in reasons and "another order" in reasons


def test_a_sampler_that_repeats_itself_is_found(
    case: Case, formed: Path, images: ImageCache, train_items: list[Item]
) -> None:
    """A model that guesses is sampled honestly, and then with every sample a copy of the first."""
    items = [item for item in train_items if item.tags["task"] == "shade"]
    settings = case.settings(diagnosis={"samples": 12})
    policy = Policy.load(str(formed), settings.model)
    case.engine = TransformersEngine(policy, settings.data.prompt, images, batch_size=256)
    run_measurement(case.ledger, case.stage, case.engine, {"shade": items}, settings, case.reporter)
    assert invalid_strata(case.ledger, case.stage, {"shade": items}, settings) == {}
    case.ledger._db.execute(
        "UPDATE rollouts SET (text, token_ids, logprobs) = (SELECT text, token_ids, logprobs FROM rollouts AS first "
        "WHERE first.item_id = rollouts.item_id AND first.sample = 0) WHERE sample > 0"
    )
    reasons = invalid_strata(case.ledger, case.stage, {"shade": items}, settings)
    assert "identical samples" in reasons["shade"]


def test_sampling_goes_on_where_it_was_cut_off(
    case: Case, tiny_items: list[Item], tmp_path: Path, images: ImageCache
) -> None:
    strata = by_stratum([item for item in tiny_items if item.split == "validation"], ["task"], seed=0)
    case.measure(strata)
    stored = case.ledger.rollouts(case.stage.stage_id)
    samples = case.settings().diagnosis.samples
    assert len(stored) == 12 * (samples + 1)
    assert case.ledger.sampled(case.stage.stage_id) == {i.id: samples for items in strata.values() for i in items}
    summary = summarise_sampling(case.ledger, case.stage)
    assert (summary["items"], summary["rollouts"]) == (12, len(stored))
    assert summary["tokens"] == sum(len(row.rollout.token_ids) for row in stored)
    cut = sum(row.rollout.finish_reason == "length" for row in stored)
    assert summary["truncated_rate"] == pytest.approx(cut / len(stored))
    again = case.measure(strata)
    assert len(case.ledger.rollouts(case.stage.stage_id)) == len(stored)

    other = Case(Ledger(tmp_path / "other.sqlite"), case.engine, case.reporter, case.settings)
    first = [row for row in stored if row.rollout.item_id == strata["shade"][0].id]
    other.ledger.save_rollouts(other.stage.stage_id, 0, first)
    resumed = other.measure(strata)
    assert {n: (r.kind, r.verdict, r.support) for n, r in resumed.items()} == {
        n: (r.kind, r.verdict, r.support) for n, r in again.items()
    }
    for one, two in zip(stored, other.ledger.rollouts(other.stage.stage_id), strict=True):
        assert (one.rollout.item_id, one.rollout.sample, one.rollout.text) == (
            two.rollout.item_id, two.rollout.sample, two.rollout.text,
        )  # fmt: skip
    other.ledger.close()


def test_no_rollouts_have_a_summary_too(ledger: Ledger) -> None:
    assert summarise_sampling(ledger, begin(ledger))["truncated_rate"] == 0.0


# -- several engines -----------------------------------------------------------------------------------------------


class Unsteady:
    """A transformers engine that yields item by item, in a scrambled order, and may die at its k-th item."""

    name = "unsteady"

    def __init__(self, engine: TransformersEngine, dies_at: int | None = None, seed: int = 0) -> None:
        self.engine, self.dies_at = engine, dies_at
        self.order = np.random.default_rng(seed)
        self.asked: list[str] = []

    def generate(
        self, requests: Sequence[Request], sampling: SamplingSettings, *, seed: int
    ) -> Iterator[list[Rollout]]:
        for number in self.order.permutation(len(requests)):
            if self.dies_at is not None and len(self.asked) >= self.dies_at:
                self.dies_at = None
                raise EngineFailure("sampling", "died", "signal 9")
            self.asked.append(requests[number].item.id)
            yield from self.engine.generate([requests[number]], sampling, seed=seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def results(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: (row.kind, row.reason, row.verdict, row.support) for name, row in rows.items()}


@pytest.fixture
def validation(tiny_items: list[Item]) -> dict[str, list[Item]]:
    return by_stratum([item for item in tiny_items if item.split == "validation"], ["task"], seed=0)


@pytest.fixture
def another(
    load_policy: Callable[..., Policy], images: ImageCache, tiny_settings: Callable[..., RunSettings]
) -> Callable[..., Unsteady]:
    def make(dies_at: int | None = None, seed: int = 0) -> Unsteady:
        engine = TransformersEngine(load_policy(), tiny_settings().data.prompt, images, batch_size=64)
        return Unsteady(engine, dies_at, seed)

    return make


def test_engines_that_die_change_neither_verdicts_nor_counts(
    case: Case, validation: dict[str, list[Item]], another: Callable[..., Unsteady], tmp_path: Path
) -> None:
    alone = results(case.measure(validation))
    said: list[str] = []
    members = [another(dies_at, seed) for seed, dies_at in enumerate((1, 2))]
    pool = Pool(members, FailureSettings(restarts=2), said.append, batch=64)  # type: ignore[list-item]
    other = Case(Ledger(tmp_path / "other.sqlite"), pool, case.reporter, case.settings)  # type: ignore[arg-type]
    assert results(other.measure(validation)) == alone
    samples = case.settings().diagnosis.samples
    stored = [(row.rollout.item_id, row.rollout.sample) for row in other.ledger.rollouts(other.stage.stage_id)]
    assert len(stored) == len(set(stored)) == 12 * (samples + 1)
    assert len(said) == sum(member.dies_at is None for member in members) >= 1
    summary = summarise_sampling(other.ledger, other.stage)
    assert summary["restarts"] == len(said)
    assert (summary["items"], summary["rollouts"]) == (12, len(stored))
    other.ledger.close()


def test_after_a_failure_only_what_is_missing_is_asked_again(
    case: Case, validation: dict[str, list[Item]], another: Callable[..., Unsteady], tmp_path: Path
) -> None:
    alone = results(case.measure(validation))
    other = Case(Ledger(tmp_path / "other.sqlite"), case.engine, case.reporter, case.settings)
    weak = another(dies_at=5)
    other.engine = Pool([weak], FailureSettings(restarts=0), pytest.fail)  # type: ignore
    with pytest.raises(MedbridgeError, match="no rollout engine is left"):
        other.measure(validation)
    kept = other.ledger.asked(other.stage.stage_id)
    assert kept == set(weak.asked) and len(kept) == 5
    first = summarise_sampling(other.ledger, other.stage)
    fresh = another(seed=7)
    other.engine = Pool([fresh], FailureSettings(restarts=0), pytest.fail)  # type: ignore
    assert results(other.measure(validation)) == alone
    assert len(fresh.asked) == 7 and not kept & set(fresh.asked)
    summary = summarise_sampling(other.ledger, other.stage)
    assert 0 < first["sampling_seconds"] < summary["sampling_seconds"]
    tokens = summary["tokens_per_second"] * summary["sampling_seconds"]  # of both processes
    assert tokens == pytest.approx(summary["tokens"]) and tokens > first["tokens"] > 0
    assert summary["items_per_second"] * summary["sampling_seconds"] == pytest.approx(12)
    other.ledger.close()


def test_a_full_disk_stops_the_sampling_and_nothing_is_lost_or_doubled(
    case: Case, validation: dict[str, list[Item]], another: Callable[..., Unsteady]
) -> None:
    """The database may not grow: SQLite then fails as on a full disk, which `test_ledger` has a real one of."""
    engine = another()
    case.engine = Pool([engine], FailureSettings(), pytest.fail)  # type: ignore
    case.ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    [[pages]] = case.ledger._db.execute("PRAGMA page_count").fetchall()
    case.ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(MedbridgeError, match="the disk is full"):
        case.measure(validation)
    kept = case.ledger.asked(case.stage.stage_id)
    assert 0 < len(kept) < 12
    asked = len(engine.asked)
    case.ledger._db.execute("PRAGMA max_page_count = 1000000")
    rows = case.measure(validation)
    samples = case.settings().diagnosis.samples
    assert case.ledger.count("rollouts") == 12 * (samples + 1)
    assert len(engine.asked) - asked == 12 - len(kept)
    assert set(rows) == {"shade", "side"}


def test_a_look_gives_each_engine_something_to_do_and_is_repeated_with_fewer_engines(case: Case) -> None:
    weak, open_ = pool("weak", 60), pool("open", 60)
    case.store(weak, lambda i: 0)
    case.store(open_, lambda i: 4 * (i % 2))
    strata = {"weak": weak, "open": open_}
    single = case.engine
    case.engine = Pool([single] * 6, FailureSettings(), pytest.fail)  # type: ignore[assignment]
    rows = case.measure(strata, **LOOK)
    assert rows["weak"].support["items"] == 24  # 6 engines x 8 items over 2 strata
    assert (rows["weak"].kind, rows["open"].kind) == ("bridge", "undecided")
    case.engine = single
    assert results(case.measure(strata, **LOOK)) == results(rows)


def test_the_meter_shows_speed_and_cache_hits_and_waits_for_no_settled_stratum(case: Case, tmp_path: Path) -> None:
    weak, others = pool("weak", 60), [dataclasses.replace(item, images=()) for item in pool("others", 12)]
    case.store(weak, lambda i: 0)
    case.reporter.console.width = 200
    rows = case.measure({"weak": weak, "others": others}, **LOOK)
    shown = (tmp_path / "log").read_text()
    measured = sum(row.support["items"] for row in rows.values())
    assert measured < 72
    assert re.search(rf" {measured}/{measured} .* left 0:00:00 [\d,]+ tokens/s, prefix cache \d+%", shown), shown


# -- the most frequent answer --------------------------------------------------------------------------------------


def answers(split: str, kind: str, texts: Sequence[str]) -> list[Item]:
    return [
        Item(f"d/{split}/{kind}{n}", "d", split, "Which?", text, None, (f"/{kind}{n}.png",), {"kind": kind}, 0.0)
        for n, text in enumerate(texts)
    ]


def test_the_baseline_is_the_most_frequent_answer_of_the_kind(tiny_settings: Callable[..., RunSettings]) -> None:
    train = [
        *answers("train", "organ", ["Lung", "lung ", "Liver"]),
        *answers("train", "side", ["b", "a", "yes", "yes"]),
    ]
    organ = answers("test", "organ", ["lung", "LUNG", "Liver", "lung"])  # 3 of 4
    side = answers("test", "side", ["yes", "no"])  # 1 of 2
    unseen = answers("test", "colour", ["yes", "lung", "red"])  # lung and yes are equally frequent: lung sorts first
    settings = tiny_settings(diagnosis={"kind_of_question": ["kind"]})
    found = frequent_answer_baseline(train, {"x": organ, "y": side, "z": unseen, "all": organ + side}, settings)
    assert {name: entry["accuracy"] for name, entry in found.items()} == pytest.approx(
        {"x": 3 / 4, "y": 1 / 2, "z": 1 / 3, "all": 4 / 6}
    )
    assert {name: entry["items"] for name, entry in found.items()} == {"x": 4, "y": 2, "z": 3, "all": 6}
    for entry in found.values():
        assert 0 <= entry["low"] <= entry["accuracy"] <= entry["high"] <= 1
    overall = tiny_settings(data={"strata": []})
    assert frequent_answer_baseline(train, {"x": organ}, overall)["x"]["accuracy"] == pytest.approx(3 / 4)


def test_the_baseline_without_training_items_or_test_items(tiny_settings: Callable[..., RunSettings]) -> None:
    test = answers("test", "organ", ["lung"])
    assert frequent_answer_baseline([], {"x": test}, tiny_settings())["x"]["accuracy"] == 0.0
    assert frequent_answer_baseline(test, {"x": []}, tiny_settings()) == {}
