"""What may be chosen about the gate, with the reasons. Nothing is computed here."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from medbridge.support.floors import MIN_INFORMATIVE

Statistic = Literal["reached", "pass"]
ErrorControl = Literal["fdr", "fwer", "none"]


class GateSettings(BaseModel):
    """When a stratum is bridged, sharpened or left alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    statistic: Statistic = Field(
        "reached",
        description="What support counts. reached: an item counts when it is answered correctly more often than "
        "guessing answers it, so that every guesser, fresh or stubborn, reads 0 at any k. pass: Pass@k, at which "
        "guessing on multiple choice soon reaches everything, and a question that is always answered wrong weighs "
        "more the larger k is.",
    )
    support_threshold: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Support above the guessing floor (0: what guessing reaches, 1: every question reached) "
        "below which a stratum is bridged and above which it may be sharpened.",
    )
    accuracy_target: float = Field(
        0.8, gt=0, le=1, description="Greedy accuracy (Acc@1) from which a supported stratum counts as done."
    )
    alpha: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="Error probability on each side: a verdict needs the whole interval, two-sided at "
        "1 - 2 alpha, to be on one side of the threshold.",
    )
    error_control: ErrorControl = Field(
        "fdr",
        description="Which error alpha limits when several strata are judged together. fdr: the expected share of "
        "wrong verdicts among those given (Benjamini-Hochberg), since a wrong verdict costs one stratum one stage. "
        "fwer: the probability of any wrong verdict (Holm). none: each stratum by itself.",
    )
    pool_below: int = Field(
        50,
        ge=0,
        description="A stratum with fewer items, undecided by itself, may be judged by its value shrunk towards the "
        "other strata. From 50 items on an interval is at most about 0.15 wide to each side on open answers, and a "
        "stratum can speak for itself. 0: never.",
    )
    k: int | None = Field(
        None,
        ge=1,
        description="The k at which the gate reads support. Left out: for reached all samples that every item has, "
        "for pass the largest k up to that at which guessing still misses `default_room` of the questions. Given, "
        "but above what is usable: the largest usable k takes its place and is named in the verdict.",
    )
    default_room: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="For pass: share of the questions that guessing must still miss at the k chosen when `k` is left "
        "out. Smaller values give a larger k and a wider interval, and weigh a question that is always "
        "answered wrong more heavily.",
    )
    min_informative: float = Field(
        MIN_INFORMATIVE,
        gt=0,
        lt=1,
        description="Support above the floor is refused at every k where guessing misses fewer of the "
        "questions than this share.",
    )
    replicates: int = Field(
        2000,
        ge=100,
        le=1_000_000,
        description="Bootstrap replicates behind each interval. No p-value is below 1 / (replicates + 1): judging "
        "many strata together may need up to 2 strata / alpha of them.",
    )
    min_items: int = Field(8, ge=1, description="With fewer items than this, a stratum is undecided whatever they say.")
