"""Hold the keep rule to its promise: few fakes for any noise, and one fold live and resumed."""
from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import asdict, replace

import pytest

import scalarloop as core

Reason, Gain, Rules, Plan = core.Reason, core.Gain, core.NoiseRules, core.Plan
HOSTILE = (0.0, -0.0, 5e-324, -5e-324, 2.3e-308, 1e-300, 0.1, 1.0, 1.0 + 2 ** -52, -1.0, 1e16,
           1e200, 1e308, -1e308, sys.float_info.max, -sys.float_info.max)


def never():
    return False


class Scripted:
    """Play back fixed runs and remember what was asked for, in order."""

    def __init__(self, candidate=(), incumbent=(), pairs=(), guards=True, time=10 ** 9):
        self.runs = {"candidate": list(candidate), "incumbent": list(incumbent)}
        self.pairs, self.guards, self.time = list(pairs), guards, time
        self.asked, self.events = [], []

    def candidate(self):
        self.asked.append("candidate")
        return self.runs["candidate"].pop(0)

    def incumbent(self):
        self.asked.append("incumbent")
        return self.runs["incumbent"].pop(0)

    def pair(self):
        self.asked.append("pair")
        self.time -= 1
        return self.pairs.pop(0)

    def guards_hold(self):
        self.asked.append("guards")
        return self.guards

    def announce(self, event):
        self.asked.append(event["type"])
        self.events.append(json.loads(json.dumps(event, allow_nan=False)))

    def out_of_time(self):
        return self.time <= 0


class Simulated:
    """Measure two trees under a noise, with a coin for each pair."""

    def __init__(self, dice, noise, incumbent=0.0, candidate=0.0):
        self.dice, self.noise = dice, noise
        self.levels, self.events, self.count = (incumbent, candidate), [], 0

    def run(self, which):
        self.count += 1
        value = self.levels[which] + self.noise(self.dice)
        return max(-sys.float_info.max, min(sys.float_info.max, value))

    def candidate(self):
        return self.run(1)

    def incumbent(self):
        return self.run(0)

    def pair(self):
        if self.dice.random() < 0.5:
            return self.run(0), self.run(1)
        candidate = self.run(1)
        return self.run(0), candidate

    def guards_hold(self):
        return True

    def announce(self, event):
        self.events.append({**event, "tree": "t"} if event["type"] == "duel" else event)

    def out_of_time(self):
        return False


def fold(events, state=None):
    for event in events:
        state = core.advance_noise(state or core.NoiseState(), event)
    return state


def baseline(*samples, **fields):
    return {"type": "baseline", "samples": list(samples), **fields}


def iteration(judgement=None, verdict="discard", **fields):
    samples = judgement.samples if judgement else {}
    return {"type": "iteration", "verdict": verdict, "samples": samples, **fields}


def noisy(*more):
    """Return a state with reference 10 and sigma 1.05, proposals free."""
    return fold([baseline(9.5, 10.5, 9.5, 10.5, 10.0), *more])


def exact(value=10.0):
    return fold([baseline(value, value, value)])


def naive_keeps(values):
    best, keeps = values[0], 0
    for value in values[1:]:
        keeps += value < best
        best = min(best, value)
    return keeps


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs, middle", [
    ([3.0], 3.0), ([1.0, 2.0], 1.5), ([3.0, 1.0, 2.0], 2.0), ([1e308, 1.7e308], 1.35e308),
    ([-1e308, 1e308], 0.0), ([5e-324, 5e-324], 5e-324), ([-1.7e308] * 2, -1.7e308),
])
def test_median_is_exact_and_never_overflows(runs, middle):
    assert core.median(runs) == middle


def test_sigma_is_one_runs_spread():
    dice = random.Random(1)
    runs = [dice.gauss(5, 3) for _ in range(20_001)]
    steps = [abs(b - a) for a, b in zip(runs, runs[1:])]
    assert core.sigma(steps) == pytest.approx(3, rel=0.03)
    drifting = [abs(b - a) for a, b in zip(*[[x + 0.01 * i for i, x in enumerate(runs)][k:]
                                             for k in (0, 1)])]
    assert core.sigma(drifting) == pytest.approx(3, rel=0.03)


def test_sigma_of_quantised_noise_is_rms_and_of_none_is_tiny_but_not_zero():
    assert core.sigma([0.0] * 7 + [4.0]) == pytest.approx(math.sqrt(16 / 16))
    assert 0 < core.sigma([]) == core.sigma([0.0] * 60) < 1e-300


@pytest.mark.parametrize("steps", [[5e-324], [sys.float_info.max], [0.0, 0.0, sys.float_info.max],
                                   [0.0, 0.0, 5e-324], [1e308] * 60])
def test_sigma_of_extreme_steps_is_finite_and_positive(steps):
    assert 0 < core.sigma(steps) <= sys.float_info.max


@pytest.mark.parametrize("agent, metric, r, q", [
    ([], [1.0], 0, 1), ([5.0], [], 0, 1), ([0.0], [1.0], 0, 1), ([10.0], [1.0], 10, 11 ** -0.2),
    ([1e9], [1.0], 100, 101 ** -0.2), ([1.0], [0.0], 100, 101 ** -0.2), ([0.0], [0.0], 0, 1),
])
def test_effort_follows_what_a_proposal_costs(agent, metric, r, q):
    state = fold([baseline(1.0, 1.0, 1.0, metric_seconds=metric),
                  {"type": "turn", "agent_seconds": agent}])
    assert core.effort(state) == (r, pytest.approx(q))


@pytest.mark.parametrize("r, slack", [(0, 0.75), (10, -0.393), (100, -1.058)])
def test_the_screen_is_strict_when_proposals_are_free_and_kind_when_dear(r, slack):
    state = noisy()._replace(agent_seconds=(float(r),), metric_seconds=(1.0,))
    expected = 10.0 - 0.5 - slack * core.sigma(state.differences)
    assert core.screen_threshold(state, Rules(), 0.5) == pytest.approx(expected, abs=2e-3)


def test_margin_in_percent_is_of_the_size_and_finite():
    assert Gain(5.0, False).over(-200.0) == 5.0
    assert Gain(5.0, percent=True).over(-200.0) == 10.0
    assert Gain(500.0, percent=True).over(1e308) == sys.float_info.max


def test_turned_negates_everything_but_makes_no_negative_zero():
    samples = {"candidate": [1.0], "incumbent": [0.0], "pairs": [[-2.0, None]]}
    other = core.turned(samples, -1)
    assert other == {"candidate": [-1.0], "incumbent": [0.0], "pairs": [[2.0, None]]}
    assert math.copysign(1, other["incumbent"][0]) == 1
    assert core.turned(other, -1) == samples


# --- the account ----------------------------------------------------------------------------------


def test_the_first_prices_and_the_cap():
    state = noisy()
    assert core.next_alpha(state, 0.2) == pytest.approx(0.2 / 3)
    state = fold([{"type": "duel", "alpha": 0.2 / 3}], state)
    assert core.next_alpha(state, 0.2) == pytest.approx((0.2 - 0.2 / 3) / 4)
    assert core.next_alpha(state._replace(keeps=50), 0.2) == 1 / 8


@pytest.mark.parametrize("chance", [0.0, 0.02, 0.5, 1.0])
def test_prices_never_add_up_to_more_than_the_account(chance):
    dice, state = random.Random(3), noisy()
    for _ in range(3_000):
        alpha = core.next_alpha(state, 0.2)
        assert 0 < alpha <= 1 / 8
        won = dice.random() < chance
        pairs = {"pairs": [[10.0, 9.0]]}
        state = fold([{"type": "duel", "alpha": alpha},
                      {"type": "iteration", "verdict": "keep" if won else "discard",
                       "samples": pairs}], state)
        assert state.spent <= 0.2 * (1 + state.keeps) + 1e-9


def test_an_empty_account_forbids_the_duel_and_charges_nothing():
    state = noisy()._replace(spent=0.2 + 1e-12)
    trial = Scripted(candidate=[0.0])
    judgement = core.judge(state, Rules(), trial)
    assert judgement.outcome is Reason.NOISE_UNDECIDED
    assert trial.asked == ["candidate", "guards"]


def test_a_cap_too_small_for_the_odds_charges_nothing():
    state = noisy()._replace(lost=10)  # alpha 0.2 / 13, odds of 65
    trial = Scripted(candidate=[0.0])
    assert core.judge(state, Rules(samples=5), trial).outcome is Reason.NOISE_UNDECIDED
    assert trial.events == []
    trial = Scripted(candidate=[0.0], pairs=[(10.0, -1e9)] * 7)
    assert core.judge(state, Rules(samples=7), trial).outcome is Reason.BETTER


# --- the duel -------------------------------------------------------------------------------------


def fight(plan, pairs, out_of_time=never):
    return core.fight_duel(plan, iter(pairs).__next__, out_of_time)


def test_a_clear_winner_doubles_the_odds_and_the_last_stake_is_clamped():
    duel = fight(Plan(0.05, 1.0), [(1e6, 0.0)] * 24)
    assert (duel.outcome, len(duel.pairs)) == (Reason.BETTER, 5)  # 2 4 8 16 20
    assert duel.odds == pytest.approx(20)


def test_the_stake_is_the_capped_tanh_of_the_gain():
    duel = fight(Plan(1 / 8, 2.0, q=0.5, gain=1.0, pairs=5), [(3.0, 1.0), (3.0, None)])
    assert duel.odds == pytest.approx(1 + math.tanh(0.75 * 0.5 * (3.0 - 1.0 - 1.0) / 2.0))
    assert duel.outcome is Reason.NOISE_FAILED
    clamped = fight(Plan(1 / 1.5, 1.0), [(-1e6, 0.0), (0.0, None)])
    assert clamped.odds == pytest.approx(0.5)  # need 1.5: neither side stakes more than 0.5


@pytest.mark.parametrize("need", [3.3, 7.7, 15, 24.1, 611.7])
def test_rounding_never_costs_a_win(need):
    duel = fight(Plan(1 / need, 1.0), [(40.0, 0.0)] * 24)
    assert duel.outcome is Reason.BETTER
    assert len(duel.pairs) == math.ceil(math.log2(need))


def test_odds_a_hair_below_what_is_needed_win():
    plan = Plan(1 / (16 * (1 + 1e-10)), 1.0, pairs=4)
    assert plan.winnable and not replace(plan, pairs=3).winnable
    assert fight(plan, [(40.0, 0.0)] * 4).outcome is Reason.BETTER
    dice = random.Random(2)
    for _ in range(300):
        need, odds, pairs = dice.uniform(2, 100), 1.0, 0
        gaps = [dice.uniform(0.1, 2) for _ in range(3)] + [50.0] * 9
        while odds < need * (1 - 1e-9):
            odds *= 1 + math.tanh(0.75 * gaps[pairs])
            pairs += 1
        assert len(fight(Plan(1 / need, 1.0), [(gap, 0.0) for gap in gaps]).pairs) == pairs


@pytest.mark.parametrize("alpha, pairs", [(1 / 16, 21), (1 / 2, 24), (1 / 15, 21)])
def test_ties_stake_nothing_and_end_when_the_rest_cannot_win(alpha, pairs):
    duel = fight(Plan(alpha, 1.0), [(1.0, 1.0)] * 24)
    assert (duel.outcome, duel.odds, len(duel.pairs)) == (Reason.NOISE_UNDECIDED, 1.0, pairs)


@pytest.mark.parametrize("q, loss, outcome", [
    (1.0, -0.50, Reason.NOISE_UNDECIDED), (1.0, -0.51, Reason.NOISE_LOST),
    (0.4, -0.79, Reason.NOISE_UNDECIDED), (0.4, -0.81, Reason.NOISE_LOST),
])
def test_the_drop_level_is_half_of_q(q, loss, outcome):
    gap = math.atanh(loss) / (0.75 * q) * (1 - 1e-12)
    duel = fight(Plan(1 / 8, 1.0, q=q, pairs=9), [(gap, 0.0)] + [(0.0, 0.0)] * 8)
    assert duel.outcome is outcome
    assert (len(duel.pairs) == 1) == (outcome is Reason.NOISE_LOST)


def test_time_is_asked_before_each_pair():
    clock = iter([False, False, True])
    duel = fight(Plan(0.05, 1.0), [(9.0, 0.0)] * 24, clock.__next__)
    assert (duel.outcome, len(duel.pairs)) == (Reason.NOISE_UNDECIDED, 2)


@pytest.mark.parametrize("r, cap, pairs", [(0, None, 24), (10, None, 63), (100, None, 152),
                                           (100, 30, 30), (0, 30, 24)])
def test_a_duels_length_follows_the_effort(r, cap, pairs):
    state = noisy()._replace(agent_seconds=(float(r),), metric_seconds=(1.0,))
    assert core.plan_duel(state, Rules(samples=cap), 0.0).pairs == pairs


NOISES = {
    "normal": lambda dice: dice.gauss(0, 1),
    "cauchy": lambda dice: math.tan(math.pi * (dice.random() - 0.5)),
    "skewed": lambda dice: dice.expovariate(1) ** 3,
    "quantised": lambda dice: float(dice.random() < 0.2),
    "bursts": lambda dice: dice.gauss(0, 20 if dice.random() < 0.1 else 0.5),
}


def duel_errors(pair_of, count=3_000, alpha=1 / 15, q=1.0, scale=1.0):
    """Return the share of duels won and the mean of the odds at the end, under no difference."""
    duels = [core.fight_duel(Plan(alpha, scale, q, pairs=round(24 / q ** 2)), pair_of(), never)
             for _ in range(count)]
    won = sum(duel.outcome is Reason.BETTER for duel in duels)
    return won / count, sum(duel.odds for duel in duels) / count


@pytest.mark.parametrize("scale, q", [(1.0, 1.0), (0.2, 0.62), (5.0, 1.0)])
@pytest.mark.parametrize("noise", NOISES)
def test_a_duel_between_equals_is_won_at_most_alpha_times(noise, scale, q):
    dice = random.Random(f"{noise} {scale}")
    trial = Simulated(dice, NOISES[noise])
    won, odds = duel_errors(lambda: trial.pair, count=1_200, q=q, scale=scale)
    alpha = 1 / 15
    assert won <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / 1_200)
    assert odds <= 1 + 3 * math.sqrt(15 / 1_200)  # the odds are a martingale below `need`


def second_is_slower(dice, coin):
    """Return pairs whose second run is always a sigma worse, ordered by a coin or never."""
    def pair():
        first, second = dice.gauss(0, 1), dice.gauss(1, 1)
        return (second, first) if not coin or dice.random() < 0.5 else (first, second)
    return pair


def test_the_coin_is_what_makes_an_order_effect_harmless():
    dice = random.Random(8)
    won, _ = duel_errors(lambda: second_is_slower(dice, coin=True), count=1_200)
    assert won <= 0.09
    cheated, _ = duel_errors(lambda: second_is_slower(dice, coin=False), count=100)
    assert cheated > 0.5  # so the check above can fail


def test_a_linear_drift_wins_nothing():
    dice, time = random.Random(9), [0.0]

    def drifting(dice):
        time[0] -= 0.5
        return time[0] + dice.gauss(0, 1)

    trial = Simulated(dice, drifting)
    won, _ = duel_errors(lambda: trial.pair, count=1_200)
    assert won <= 0.09


# --- judging --------------------------------------------------------------------------------------


def test_a_noisy_winner_is_screened_guarded_announced_and_fought_in_this_order():
    trial = Scripted(candidate=[2.0], pairs=[(10.0, 5.0 + k) for k in range(9)])
    judgement = core.judge(noisy(), Rules(), trial)
    fought = trial.asked.count("pair")
    assert trial.asked == ["candidate", "guards", "duel"] + ["pair"] * fought
    assert judgement.outcome is Reason.BETTER and not judgement.unproven
    numbers = [second for _, second in judgement.samples["pairs"]]
    assert judgement.value == core.median(numbers) != 2.0
    assert judgement.samples["candidate"] == [2.0]
    assert 2.0 not in numbers
    assert trial.events == [{"type": "duel", **asdict(core.plan_duel(noisy(), Rules(), 0.0))}]
    assert judgement.evidence == f"{fought} pairs, odds 15 of 15 needed, alpha left 0.13"


def test_a_run_that_is_not_better_enough_is_dropped_unguarded():
    state = noisy()
    limit = core.screen_threshold(state, Rules(), 0.0)
    trial = Scripted(candidate=[limit])
    judgement = core.judge(state, Rules(), trial)
    assert (judgement.outcome, judgement.value) == (Reason.NOISE_NOT_BETTER, limit)
    assert trial.asked == ["candidate"]
    trial = Scripted(candidate=[math.nextafter(limit, 0)], guards=False)
    assert core.judge(state, Rules(), trial).outcome is Reason.GUARD_EXIT
    assert trial.asked == ["candidate", "guards"]


def test_failures_of_the_candidate_are_never_numbers():
    judgement = core.judge(noisy(), Rules(), Scripted(candidate=[None]))
    assert (judgement.outcome, judgement.value) == (Reason.METRIC_MISSING, None)
    trial = Scripted(candidate=[2.0], pairs=[(10.0, 2.0), (10.0, None)])
    judgement = core.judge(noisy(), Rules(), trial)
    assert judgement.outcome is Reason.NOISE_FAILED
    assert judgement.samples["pairs"] == [[10.0, 2.0], [10.0, None]]
    trial = Scripted(candidate=[2.0], pairs=[(10.0, None)])
    assert core.judge(noisy(), Rules(), trial).value == 2.0


def test_no_time_for_a_pair_is_a_drop_that_costs_nothing():
    trial = Scripted(candidate=[2.0], time=0)
    assert core.judge(noisy(), Rules(), trial).outcome is Reason.NOISE_UNDECIDED
    assert trial.events == []
    trial = Scripted(candidate=[2.0], pairs=[(10.0, 2.0)] * 9, time=2)
    judgement = core.judge(noisy(), Rules(), trial)
    assert (judgement.outcome, trial.asked.count("pair")) == (Reason.NOISE_UNDECIDED, 2)


def test_the_incumbent_is_measured_again_after_eight_candidates():
    drop = core.judge(noisy(), Rules(), Scripted(candidate=[99.0]))
    state = noisy(*[iteration(drop)] * 7)
    assert core.judge(state, Rules(), Scripted(candidate=[99.0])).samples["incumbent"] == []
    state = fold([iteration(drop)], state)
    trial = Scripted(candidate=[99.0], incumbent=[30.0])
    judgement = core.judge(state, Rules(), trial)
    assert trial.asked == ["incumbent", "candidate"]
    state = fold([iteration(judgement)], state)
    assert (state.since_incumbent, state.reference[-1]) == (1, 30.0)
    assert state.differences == noisy().differences + (20.0,)  # from the baseline's last run
    nothing = fold([iteration(verdict="no_change")], state)
    assert nothing.since_incumbent == 1


def test_a_fresh_incumbent_run_already_counts_for_this_candidate():
    state = noisy()._replace(since_incumbent=8, reference=(10.0,))
    trial = Scripted(candidate=[14.0], incumbent=[30.0], guards=False)  # the median is now 20
    assert core.judge(state, Rules(), trial).outcome is Reason.GUARD_EXIT


def test_min_gain_in_percent_is_frozen_at_the_screen():
    trial = Scripted(candidate=[2.0], pairs=[(1000.0, 998.0)] * 9)
    judgement = core.judge(noisy(), Rules(min_gain=Gain(10.0, percent=True)), trial)
    assert trial.events[0]["gain"] == 1.0  # of the reference 10, not of the pair's 1000
    assert judgement.outcome is Reason.BETTER


def test_a_gain_within_min_gain_is_lost():
    trial = Scripted(candidate=[2.0], pairs=[(10.0, 9.0)] * 40)
    assert core.judge(noisy(), Rules(min_gain=Gain(3.0, False)), trial).outcome is Reason.NOISE_LOST


@pytest.mark.parametrize("value, outcome", [
    (6.0, Reason.BETTER), (math.nextafter(6.0, 0), Reason.IMPLAUSIBLE)])
@pytest.mark.parametrize("most", [Gain(4.0, False), Gain(40.0, percent=True)])
def test_a_gain_beyond_max_gain_is_quarantined_and_the_edge_is_not(value, outcome, most):
    trial = Scripted(candidate=[value, value], incumbent=[10.0])
    assert core.judge(exact(), Rules(max_gain=most), trial).outcome is outcome


def test_a_duel_won_by_more_than_max_gain_is_no_keep():
    rules = Rules(max_gain=Gain(4.0, False))
    fair = Scripted(candidate=[6.5], pairs=[(10.0, 6.0)] * 9)
    assert core.judge(noisy(), rules, fair).outcome is Reason.BETTER
    shifted = Scripted(candidate=[6.5], pairs=[(8.0, 5.0)] * 9)  # the pairs' own incumbent counts
    assert core.judge(noisy(), rules, shifted).outcome is Reason.BETTER
    gamed = Scripted(candidate=[6.5], pairs=[(10.0, 5.9)] * 9)
    judgement = core.judge(noisy(), rules, gamed)
    assert judgement.outcome is Reason.IMPLAUSIBLE
    state = fold([*gamed.events, iteration(judgement)], noisy())
    assert (state.keeps, state.lost, state.spent) == (0, 1, pytest.approx(0.2 / 3))


@pytest.mark.parametrize("runs, complete, is_exact", [
    ([1.0], False, False), ([1.0] * 2, False, False), ([1.0] * 3, True, True),
    ([1.0, 1.0, 2.0], False, False), ([1.0, 1.0, 2.0, 1.0, 1.0], True, False)])
def test_a_baseline_is_three_equal_runs_or_five(runs, complete, is_exact):
    assert core.baseline_is_complete(runs) is complete
    assert fold([baseline(*runs)]).exact is is_exact


# --- exact metrics --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [10.0, 10.5])
def test_an_exact_drop_costs_one_run(value):
    trial = Scripted(candidate=[value])
    assert core.judge(exact(), Rules(), trial).outcome is Reason.NOT_BETTER
    assert trial.asked == ["candidate"]


def test_an_exact_zero_is_no_better_than_zero_when_proposals_are_dear():
    state = fold([{"type": "turn", "agent_seconds": [900.0]}], exact(0.0))
    state = fold([{"type": "turn", "metric_seconds": [1.0]}], state)
    trial = Scripted(candidate=[0.0])
    assert core.judge(state, Rules(), trial).outcome is Reason.NOT_BETTER


def test_an_exact_keep_costs_three_runs_and_no_alpha():
    trial = Scripted(candidate=[9.0, 9.0], incumbent=[10.0])
    judgement = core.judge(exact(), Rules(), trial)
    assert trial.asked == ["candidate", "guards", "candidate", "incumbent"]
    assert (judgement.outcome, judgement.value) == (Reason.BETTER, 9.0)
    state = fold([iteration(judgement, "keep")], exact())
    assert state.exact and set(state.reference) == {9.0}
    assert (state.keeps, state.spent) == (0, 0.0)
    trial = Scripted(candidate=[9.0])
    assert core.judge(state, Rules(), trial).outcome is Reason.NOT_BETTER


def test_an_exact_metric_is_never_refreshed_and_min_gain_is_strict():
    rules, state = Rules(min_gain=Gain(0.5, False)), exact()
    for _ in range(30):
        trial = Scripted(candidate=[9.5])
        state = fold([iteration(core.judge(state, rules, trial))], state)
        assert trial.asked == ["candidate"]
    trial = Scripted(candidate=[math.nextafter(9.5, 0)] * 2, incumbent=[10.0])
    assert core.judge(state, rules, trial).outcome is Reason.BETTER


def test_a_number_that_comes_once_and_then_not_is_dropped():
    trial = Scripted(candidate=[9.0, None])
    assert core.judge(exact(), Rules(), trial).outcome is Reason.NOISE_UNCONFIRMED
    assert trial.asked == ["candidate", "guards", "candidate"]


@pytest.mark.parametrize("again, standing", [(9.1, 10.0), (9.0, 10.1), (8.0, 10.0), (9.0, 9.9)])
def test_any_difference_ends_exact_mode_and_the_duel_decides(again, standing):
    trial = Scripted([9.0, again], [standing, 10.2, 9.8, 10.1, 9.9, 10.0], [(10.0, 10.5)] * 60)
    judgement = core.judge(exact(), Rules(), trial)
    assert trial.asked[:3] == ["candidate", "guards", "candidate"]
    assert trial.asked[3:11] == ["incumbent"] * 6 + ["noise", "duel"]
    assert judgement.outcome is Reason.NOISE_LOST
    state = fold([*trial.events, iteration(judgement)], exact())
    assert not state.exact
    after = fold(trial.events[:1], exact())
    assert after.reference == (10.2, 9.8, 10.1, 9.9, 10.0)
    assert len(after.differences) == 7  # from 10.0 over six runs, and the candidate's; no old zeros
    assert trial.events[1]["scale"] == core.sigma(after.differences) > 1e-3


def test_only_the_candidates_own_noise_still_gives_a_scale():
    trial = Scripted([9.0, 9.5], [10.0] * 6, [(10.0, 11.0)] * 9)
    core.judge(exact(), Rules(), trial)
    assert 0.1 < trial.events[1]["scale"] < 1


def test_leaving_exact_mode_resets_the_account():
    state = exact()._replace(keeps=40, spent=0.1, lost=7)
    noise = {"type": "noise", "samples": {
        "candidate": [9.0, 9.1], "incumbent": [10.0, 10.2, 9.8, 10.1, 9.9, 10.0], "pairs": []}}
    state = fold([noise], state)
    assert (state.keeps, state.spent, state.lost) == (0, 0.0, 0)
    assert core.next_alpha(state, 0.2) == pytest.approx(0.2 / 3)


def test_forty_exact_keeps_and_then_noise_keep_no_fakes():
    dice, fakes = random.Random(4), 0
    for _ in range(10):
        state, level = exact(100.0), 100.0
        for _ in range(40):
            level -= 1
            trial = Scripted(candidate=[level] * 2, incumbent=[level + 1])
            judgement = core.judge(state, Rules(), trial)
            assert judgement.outcome is Reason.BETTER
            state = fold([iteration(judgement, "keep")], state)
        fakes += len(play(dice, 100, state=state, level=level)[1])
    assert fakes <= 5  # 0.2 * 10 are expected at most; 40 keeps' worth of risk gave 18


# --- the single-run rule --------------------------------------------------------------------------


def test_without_confidence_one_better_run_is_kept_and_marked():
    rules = Rules(min_gain=Gain(0.25, False), risk=None)
    state = noisy()._replace(since_incumbent=50)
    assert core.judge(state, rules, Scripted([9.75])).outcome is Reason.NOT_BETTER
    trial = Scripted(candidate=[9.7])
    judgement = core.judge(state, rules, trial)
    assert judgement.outcome is Reason.BETTER and judgement.unproven
    assert trial.asked == ["candidate", "guards"]
    state = fold([iteration(judgement, "keep")], state)
    assert (state.reference, state.keeps, state.spent) == ((9.7,), 0, 0.0)


def test_without_confidence_an_exact_metric_is_not_confirmed_either():
    trial = Scripted(candidate=[9.0])
    assert core.judge(exact(), Rules(risk=None), trial).unproven


# --- whole sessions -------------------------------------------------------------------------------


def play(dice, candidates, state=None, level=10.0, noise=lambda dice: dice.gauss(0, 1), gain=0.0,
         agent=1.0, chance=0.1, rules=Rules()):
    """Play a session; return its events and, of each keep, the true gain."""
    events, won = [], []

    def note(event):
        nonlocal state
        events.append(json.dumps(event, allow_nan=False))
        state = core.advance_noise(state, event)

    if state is None:
        state = core.NoiseState()
        trial, runs = Simulated(dice, noise, level), []
        while not core.baseline_is_complete(runs):
            runs.append(trial.incumbent())
        note(baseline(*runs, metric_seconds=[1.0] * len(runs)))
    for _ in range(candidates):
        note({"type": "turn", "agent_seconds": [agent]})
        better = gain if dice.random() < chance else 0.0
        trial = Simulated(dice, noise, level, level - better)
        judgement = core.judge(state, rules, trial)
        for event in trial.events:
            note(event)
        kept = judgement.outcome is Reason.BETTER
        if kept:
            won.append(better)
            level = max(level - better, -sys.float_info.max)
        verdict = "keep" if kept else "discard"
        note(iteration(judgement, verdict, metric_seconds=[1.0] * trial.count))
    play.state = state
    return events, [gain for gain in won if gain == 0.0] if gain == 0.0 else won


@pytest.mark.parametrize("agent", [0.0, 10.0, 100.0])
def test_a_constant_plus_noise_keeps_nothing_where_naive_keeps_several(agent):
    clean, naive, sessions = 0, 0, 40
    for seed in range(sessions):
        dice = random.Random(f"null {seed}")
        noise = lambda dice: dice.gauss(0, 0.02)  # noqa: E731
        clean += not play(dice, 100, noise=noise, agent=agent)[1]
        naive += naive_keeps([10.0 + noise(dice) for _ in range(101)])
    assert clean >= 0.8 * sessions  # at least 4 of 5
    assert naive >= 3 * sessions


def test_real_gains_are_kept_and_few_fakes():
    won = [gain for seed in range(5)
           for gain in play(random.Random(seed), 100, gain=2.0, agent=100.0)[1]]
    assert len(won) >= 35  # of about 50 true ones
    assert won.count(0.0) <= 0.2 * (5 + len(won))


def test_late_noise_on_an_exact_metric_keeps_nothing():
    keeps = 0
    for seed in range(10):
        count = [0]

        def late(dice):
            count[0] += 1
            return dice.gauss(0, 1) if count[0] > 30 else 0.0

        keeps += len(play(random.Random(seed), 100, noise=late)[1])
        assert not play.state.exact
    assert keeps <= 4


def quantised(dice):
    return float(dice.random() < 0.1)


SESSIONS = [dict(gain=1.5), dict(gain=0.0, agent=100.0), dict(noise=lambda dice: 0.0, gain=1.0),
            dict(noise=quantised, gain=0.5), dict(rules=Rules(risk=None), gain=1.0),
            dict(rules=Rules(min_gain=Gain(1.0, percent=True), samples=9), gain=2.0)]


@pytest.mark.parametrize("number", range(len(SESSIONS)))
def test_a_resume_at_any_record_gives_the_state_of_the_live_run(number):
    lines, _ = play(random.Random(number), 120, **SESSIONS[number])
    assert play.state == fold(map(json.loads, lines))
    live = core.NoiseState()
    for cut, line in enumerate(lines):
        live = core.advance_noise(live, json.loads(line))
        resumed = fold(map(json.loads, lines[: cut + 1]))
        assert resumed == live
        stored = json.loads(json.dumps(live._asdict(), allow_nan=False))
        assert {key: tuple(value) if isinstance(value, list) else value
                for key, value in stored.items()} == live._asdict()


def test_a_ledger_in_the_users_direction_folds_to_the_same_state_negated():
    lines, _ = play(random.Random(6), 80, gain=1.5)
    negated = [json.loads(line) for line in lines]
    for event in negated:
        if "samples" in event:
            event["samples"] = core.turned(event["samples"], -1)
    state = fold(negated)
    assert state.keeps and min(state.reference) < max(state.reference)
    assert state._replace(reference=core.turned(state.reference, -1)) == play.state


def test_what_a_judgement_decides_depends_on_the_ledger_alone():
    lines, _ = play(random.Random(5), 60, gain=1.5)
    state = fold(map(json.loads, lines))
    verdicts = [core.judge(start, Rules(), Simulated(random.Random(1), NOISES["normal"], 0, -3))
                for start in (play.state, state)]
    assert verdicts[0] == verdicts[1]


def test_an_open_duel_is_lost_and_paid():
    trial = Scripted(candidate=[2.0], pairs=[(10.0, 1.0)] * 9)
    judgement = core.judge(noisy(), Rules(), trial)
    begun = fold([{**trial.events[0], "tree": "abc"}], noisy())
    assert begun.open_duel == "abc"
    assert (begun.lost, begun.spent) == (1, trial.events[0]["alpha"])
    dead = fold([{"type": "resume"}, iteration(verdict="discard")], begun)
    assert (dead.lost, dead.spent, dead.open_duel) == (1, begun.spent, None)
    won = fold([iteration(judgement, "keep")], begun)
    assert (won.lost, won.keeps, won.spent, won.open_duel) == (0, 1, begun.spent, None)


def test_a_winners_runs_become_the_reference_and_a_losers_do_not():
    pairs = [[10.0 + k, 5.0 + k] for k in range(12)]
    event = {"type": "iteration", "samples": {"candidate": [1.0], "pairs": pairs}}
    kept = fold([{**event, "verdict": "keep"}], noisy())
    assert kept.reference == tuple(5.0 + k for k in range(3, 12))
    lost = fold([{**event, "verdict": "guard_failed"}], noisy())
    assert lost.reference == tuple(10.0 + k for k in range(3, 12))
    assert kept.differences == lost.differences
    assert len(kept.differences) == 4 + 12 + 11  # baseline, incumbent, candidate


def test_both_trees_of_a_long_duel_have_half_of_the_differences():
    pairs = [[10.0 + k, 5.0 + 3 * k] for k in range(50)]
    event = {"type": "iteration", "verdict": "discard", "samples": {"pairs": pairs}}
    steps = fold([event], noisy()).differences
    assert (steps.count(1.0), steps.count(3.0)) == (30, 30)


def test_no_history_grows_without_bound():
    pairs = [[float(k), float(-k)] for k in range(152)]
    state = noisy()
    for _ in range(50):
        state = fold([iteration(verdict="discard", agent_seconds=[1.0], metric_seconds=[1.0] * 304)
                      | {"samples": {"candidate": [1.0], "pairs": pairs}}], state)
    sizes = [len(value) for value in state._asdict().values() if isinstance(value, tuple)]
    assert sizes == [9, 60, 20, 60]


def test_an_unknown_record_changes_nothing():
    assert fold([{"type": "start"}, {"type": "resume"}, {"type": "stop"}], noisy()) == noisy()


def test_hostile_numbers_raise_nothing_and_stay_finite():
    dice = random.Random(11)
    choose = lambda dice: dice.choice(HOSTILE)  # noqa: E731
    outcomes = set()
    for _ in range(300):
        rules = Rules(min_gain=Gain(dice.choice((0.0, 1e308, 5e-324)), dice.random() < 0.5),
                      max_gain=dice.choice((None, Gain(0.0, False), Gain(1e308, percent=True))),
                      risk=dice.choice((None, 1e-300, 0.2, 0.999)),
                      samples=dice.choice((None, 5, 10 ** 6)))
        pool = dice.sample(HOSTILE, dice.choice((1, 2, 3, 16)))
        few = lambda dice: dice.choice(pool)  # noqa: B023, E731
        lines, _ = play(dice, 15, level=0.0, noise=dice.choice((choose, few)), rules=rules,
                        agent=dice.choice(tuple(abs(x) for x in HOSTILE)), gain=1e308, chance=0.5)
        outcomes.update(json.loads(line).get("verdict") for line in lines)
        assert 0 < core.sigma(play.state.differences) < math.inf
        assert 0 < core.effort(play.state)[1] <= 1
        assert not any(map(math.isnan, play.state.reference + play.state.differences))
    assert {"keep", "discard"} <= outcomes


def test_hostile_numbers_in_a_duel_keep_the_odds_a_number():
    dice = random.Random(12)
    for _ in range(5_000):
        plan = Plan(dice.choice((0.0, 5e-324, 1e-300, 0.05, 1 / 8)), abs(dice.choice(HOSTILE[2:])),
                    dice.choice((0.4, 1.0)), dice.choice((0.0, 1e308)), dice.choice((1, 24)))
        duel = core.fight_duel(plan, lambda: (dice.choice(HOSTILE), dice.choice(HOSTILE)), never)
        assert 0 <= duel.odds <= plan.need * (1 + 1e-9)


# --- broken metrics, guards, the closing pairs ----------------------------------------------------


def test_ten_trees_with_the_baselines_number_look_constant():
    drop = core.judge(exact(), Rules(), Scripted(candidate=[10.0]))
    failed = core.judge(exact(), Rules(), Scripted(candidate=[None]))
    state = fold([iteration(drop)] * 9 + [iteration(failed, "crash")], exact())
    assert not core.looks_constant(state)
    assert core.looks_constant(fold([iteration(drop)], state))


@pytest.mark.parametrize("at", [0, 5, 9])
def test_one_tree_that_ever_differed_shows_that_the_metric_lives(at):
    drop = core.judge(exact(), Rules(), Scripted(candidate=[10.0]))
    other = core.judge(exact(), Rules(), Scripted(candidate=[11.0]))
    events = [iteration(drop)] * 40
    events.insert(at, iteration(other))
    assert not core.looks_constant(fold(events, exact()))
    assert not core.looks_constant(noisy(*[iteration(drop)] * 40))


def worse(pair, runs=(1.0, 1.0, 1.0), tolerance=0.0):
    return core.worse_duel(pair, runs, tolerance, never)


def test_a_guard_fails_only_when_it_is_worse_by_more_than_the_tolerance():
    assert worse(lambda: (1.0, 1.2), tolerance=0.1).outcome is Reason.BETTER
    assert worse(lambda: (1.0, 1.0), tolerance=0.1).outcome is Reason.NOISE_LOST
    assert worse(lambda: (1.0, 0.2), tolerance=0.1).outcome is Reason.NOISE_LOST
    assert worse(lambda: (0.0, 0.5), tolerance=0.5).outcome is Reason.NOISE_UNDECIDED  # exactly that
    assert len(worse(lambda: (1.0, 1.2), tolerance=0.1).pairs) == 5  # odds of 20: 2 4 8 16 20
    assert len(worse(lambda: (1.0, 1.5), runs=(0.0, 1.0, 0.0, 1.0, 0.0)).pairs) > 5  # scale 1
    failed = worse(lambda: (1.0, None), tolerance=0.1)
    assert (failed.outcome, failed.pairs) == (Reason.NOISE_FAILED, ((1.0, None),))


def test_a_guard_at_its_tolerance_fails_at_most_one_time_in_twenty():
    dice, count = random.Random(13), 1_000
    runs = [dice.gauss(0, 1) for _ in range(5)]
    trial = Simulated(dice, NOISES["normal"], 0.0, 2.0)
    failed = sum(worse(trial.pair, runs, 2.0).outcome is Reason.BETTER for _ in range(count))
    assert 0 < failed / count <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / count)


@pytest.mark.parametrize("damage, least, most", [(0.0, 0.0, 0.07), (3.0, 0.9, 1.0)])
def test_a_canary_is_noticed_by_a_healthy_metric_and_not_by_a_blind_one(damage, least, most):
    dice, won = random.Random(14), 0
    for _ in range(300):
        runs = [dice.gauss(0, 1) for _ in range(5)]
        trial = Simulated(dice, NOISES["normal"], 0.0, damage)
        won += worse(trial.pair, runs).outcome is Reason.BETTER
    assert least <= won / 300 <= most


def test_a_blind_exact_metric_does_not_pass_the_canary():
    duel = worse(lambda: (1.0, 1.0))
    assert duel.outcome is Reason.NOISE_UNDECIDED
    assert worse(lambda: (1.0, 1.0 + 1e-12)).outcome is Reason.BETTER


def test_the_closing_gain_is_a_median_with_a_covering_interval():
    gain = core.closing_gain([(10.0, 10.0 - k) for k in (3, 1, 2, 5, 4)])
    assert (gain.median, gain.low, gain.high, gain.pairs) == (3.0, 1.0, 5.0, 5)
    gain = core.closing_gain([(float(k), 0.0) for k in range(9)])
    assert (gain.median, gain.low, gain.high) == (4.0, 1.0, 7.0)
    assert core.closing_gain([(1.0, 0.5)]).median == 0.5
    assert core.closing_gain([(1.7e308, -1.7e308)] * 5).median == sys.float_info.max


@pytest.mark.parametrize("count", [5, 9, 20])
def test_the_closing_interval_covers_fifteen_times_in_sixteen(count):
    dice, covered = random.Random(count), 0
    for _ in range(1_500):
        gain = core.closing_gain([(dice.gauss(1, 1), dice.gauss(0, 1)) for _ in range(count)])
        covered += gain.low <= 1 <= gain.high
    assert 15 / 16 - 0.02 <= covered / 1_500
    assert covered / 1_500 < 0.99  # not trivially wide
