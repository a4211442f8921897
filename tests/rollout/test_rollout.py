"""Episodes, and the arrays they are packed into."""

import pytest
import torch
from helpers import HOUSEHOLD, configure, make_tiny, play_script, play_tasks

from hiper_fast import response
from hiper_fast.envs.household import Household
from hiper_fast.packing import interleave, prefix_sums
from hiper_fast.rollout.engines import Answer
from hiper_fast.rollout.engines.paged import Engine
from hiper_fast.rollout.episode import Play
from hiper_fast.rollout.prompter import Prompter
from hiper_fast.rollout.summary import summarise
from hiper_fast.rollout.trajectory import Episode, pack

KEEP, SWITCH, INVALID = "KEEP", "SWITCH", "MAYBE"


class Lines:
    """An environment that is won by "win" and lost by "lose", and says what it was told."""

    def __init__(self):
        self.told = []

    def reset(self, *, seed=None, options=None):
        return "You are here.\n\nYour task is to: be done.", self.info(False)

    def step(self, command):
        self.told.append(command)
        over = command in ("win", "lose")
        return (
            f"  told {command}\n",
            10.0 * (command == "win"),
            over,
            False,
            self.info(command == "win"),
        )

    def info(self, won):
        commands = ["win", "lose", f"wait {len(self.told)}"]
        return {"admissible_commands": commands, "won": won, "task": "be done.", "task_type": "odd"}


@pytest.fixture(scope="module")
def agent():
    return make_tiny()


def settings(max_turns=20, **agent):
    config = configure()
    config.env.max_turns, config.reward.success, config.reward.inadmissible = max_turns, 10.0, 0.0
    config.agent.max_response_tokens, config.agent.max_prompt_tokens = 12, 4000
    for name, value in agent.items():
        setattr(config.agent, name, value)
    return config


def begin(env, task, config):
    return Play(env, task, HOUSEHOLD(config.env), config).begin()


def say(switch, subgoal, action):
    return f"<switch>{switch}</switch><subgoal>{subgoal}</subgoal><action>{action}</action>"


def run(agent, scripts, max_turns=20, sizes=None, **options):
    """Plays each list of responses in an environment of its own; returns (plays, episodes)."""
    config = settings(max_turns, **options)
    plays = [begin(Lines(), {}, config) for _ in scripts]
    left = {id(play): list(script) for play, script in zip(plays, scripts, strict=True)}

    def respond(running):
        if sizes is not None:
            sizes.append(len(running))
        texts = [left[id(play)].pop(0) for play in running]
        ids = [agent.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [Answer(row + [agent.stop_ids[0]], [-0.5] * (len(row) + 1)) for row in ids]

    prompter = Prompter(agent.tokenizer, config.agent, HOUSEHOLD.styles["compact"])
    return plays, play_script(plays, prompter, respond, agent.decode)


def prompt_text(agent, episode, turn):
    return agent.tokenizer.decode(episode.prompts[turn])


# One turn.


def test_the_first_turn_sets_the_subgoal_keep_keeps_it_and_switch_changes_it(agent):
    script = [
        say(KEEP, "find a", "wait"),  # nothing to keep yet
        say(KEEP, "find b", "wait"),
        say(SWITCH, "find c", "wait"),
        say("", "find d", "wait"),
        say(SWITCH, "", "wait"),  # switches to nothing: the old one stays
        say(INVALID, "find e", "wait"),  # neither word switches, as in the roles
        say("keep", "find f", "win"),
    ]
    _, [episode] = run(agent, [script])
    subgoals = [turn.subgoal for turn in episode.turns]
    assert subgoals == ["find a", "find a", "find c", "find c", "find c", "find e", "find e"]
    shown = [
        prompt_text(agent, episode, i).split("subgoal: ")[1].strip() for i in range(len(script))
    ]
    assert shown == ["None", *subgoals[:-1]]


def test_written_subgoals_are_shown_on_keep_turns_too(agent):
    """As the reference implementation shows them; a turn that names none leaves the last one."""
    script = [
        say(KEEP, "find a", "wait"),
        say(KEEP, "find b", "wait"),
        say(SWITCH, "", "wait"),
        "<action>wait</action>",
        say(KEEP, "find c", "win"),
    ]
    _, [episode] = run(agent, [script], shown_subgoal="written")
    subgoals = [turn.subgoal for turn in episode.turns]
    assert subgoals == ["find a", "find b", "find b", "find b", "find c"]
    shown = [
        prompt_text(agent, episode, i).split("subgoal: ")[1].strip() for i in range(len(script))
    ]
    assert shown == ["None", *subgoals[:-1]]


def test_a_bad_switch_text_means_the_same_to_rollout_and_roles(agent):
    """The reference read it as SWITCH in one module and as KEEP in another."""
    for text in ("MAYBE", "", " ", "keep", "KEEP ", "switch", "SWITCH!", "no", "界"):
        _, [episode] = run(agent, [[say(KEEP, "first", "wait"), say(text, "second", "win")]])
        switched = episode.turns[1].subgoal == "second"
        t = pack([episode], agent.find_roles)
        assert bool(t.switch[1]) == switched == response.parse(say(text, "second", "win")).switch, (
            text
        )


def test_no_subgoal_at_first(agent):
    _, [episode] = run(agent, [["<action>wait</action>", say(KEEP, "find a", "win")]])
    assert [turn.subgoal for turn in episode.turns] == [None, None]


def test_without_an_action_block_the_last_30_characters_are_sent(agent):
    long = "I think that one should now really go to the Fridge 1"
    plays, [episode] = run(agent, [[long, say(SWITCH, "s", "win")]])
    assert plays[0].env.told[0] == long[-30:].lower() and len(plays[0].env.told[0]) == 30
    t = pack([episode], agent.find_roles)
    first = t.roles[: int(t.cu_tokens[1])]
    assert (first == 1).all(), "it trains as an action, whole"
    assert t.valid.tolist() == [False, True]


def test_actions_are_sent_in_lower_case_and_stripped(agent):
    plays, _ = run(agent, [[say(SWITCH, "s", "  Go To Desk 1 "), say(KEEP, "s", "WIN")]])
    assert plays[0].env.told == ["go to desk 1", "win"]


def test_history_and_admissible_commands_move_on(agent):
    _, [episode] = run(
        agent, [[say(SWITCH, "s", "go to desk 1"), say(KEEP, "s", "wait"), say(KEEP, "s", "win")]]
    )
    texts = [prompt_text(agent, episode, i) for i in range(3)]
    assert [
        "did: \n" in texts[0],
        "did: desk 1\n" in texts[1],
        "did: desk 1; wait\n" in texts[2],
    ] == [True] * 3
    assert "see: You are here.\n" in texts[0] and "see: told wait\n" in texts[2]
    assert [turn.observation for turn in episode.turns] == [
        "You are here.",
        "told go to desk 1",
        "told wait",
    ]


def test_the_opening_is_the_room_alone():
    observation, info = Household().reset(seed=3)
    text = HOUSEHOLD(configure().env).strip_opening(observation)
    assert text.startswith("You are in the middle of a room.")
    assert "Your task" not in text and info["task"] not in text and "TextWorld" not in text


# Ends.


def test_finished_episodes_leave_the_batch(agent):
    sizes = []
    wait, win, lose = (say(SWITCH, "s", word) for word in ("wait", "win", "lose"))
    _, episodes = run(
        agent, [[win], [wait] * 5, [wait, lose], [wait, wait, win]], max_turns=5, sizes=sizes
    )
    assert sizes == [4, 3, 2, 1, 1]
    assert [len(e.responses) for e in episodes] == [1, 5, 2, 3]
    assert [e.won for e in episodes] == [True, False, False, True]
    assert [e.terminated for e in episodes] == [True, False, True, True]
    assert [e.rewards for e in episodes] == [[10.0], [0.0] * 5, [0.0, 0.0], [0.0, 0.0, 10.0]]


def test_the_turn_limit_truncates_and_keeps_the_state_after_it(agent):
    """The reference set `done` at the limit, so that truncation never bootstrapped."""
    wait = say(SWITCH, "s", "wait")
    _, [cut, won] = run(agent, [[wait, wait], [wait, say(KEEP, "s", "win")]], max_turns=2)
    assert not cut.terminated and len(cut.prompts) == len(cut.responses) + 1 == 3
    assert won.terminated and len(won.prompts) == len(won.responses) == 2
    assert "did: wait; wait\n" in prompt_text(agent, cut, 2)
    t = pack([cut, won], agent.find_roles)
    assert t.terminated.tolist() == [False, True] and t.won.tolist() == [False, True]
    assert t.final_ids.tolist() == cut.prompts[-1]
    assert t.cu_final.tolist() == [0, len(cut.prompts[-1]), len(cut.prompts[-1])]


def test_the_success_reward_is_the_configured_one(agent):
    config = settings()
    config.reward.success = 3.0
    play = begin(Lines(), {}, config)
    ids = agent.tokenizer(say(SWITCH, "s", "win"), add_special_tokens=False)["input_ids"]
    play.step(Answer(ids, [0.0] * len(ids)), agent.decode(ids))
    assert play.episode.rewards == [3.0] and play.over


def test_a_command_that_is_not_listed_costs(agent):
    config = settings()
    config.reward.inadmissible = -0.5
    play = begin(Lines(), {}, config)
    for action in ("wait 0", "fly", "win"):
        ids = agent.tokenizer(say(SWITCH, "s", action), add_special_tokens=False)["input_ids"]
        play.step(Answer(ids, [0.0] * len(ids)), agent.decode(ids))
    assert play.episode.rewards == [0.0, -0.5, 10.0]


def test_an_environment_may_have_a_limit_of_its_own(agent):
    class Short(Lines):
        def step(self, command):
            observation, reward, terminated, _, info = super().step(command)
            return observation, reward, terminated, len(self.told) == 2, info

    config, script = settings(), [say(SWITCH, "s", "wait")] * 5
    play = begin(Short(), {}, config)
    prompter = Prompter(agent.tokenizer, config.agent, HOUSEHOLD.styles["compact"])
    ids = agent.tokenizer(script[0], add_special_tokens=False)["input_ids"]
    answer = Answer(ids, [0.0] * len(ids))
    [episode] = play_script([play], prompter, lambda plays: [answer], agent.decode)
    assert len(episode.responses) == 2 and not episode.terminated
    assert len(episode.prompts) == 3, "the state after it is valued, as at the turn limit"


def test_no_plays():
    assert play_script([], lambda states: [], None, None) == []


def test_truncated_prompts_are_counted(agent):
    script = [[say(SWITCH, "s", "wait")] * 3]
    _, [episode] = run(agent, script, max_turns=3, max_prompt_tokens=5)
    assert episode.truncated_prompts == len(episode.prompts) == 4
    assert all(len(ids) <= 5 for ids in episode.prompts)
    _, [episode] = run(agent, script, max_turns=3)
    assert episode.truncated_prompts == 0


def test_responses_as_long_as_they_may_be_are_counted(agent):
    config = settings(max_response_tokens=12)
    play = begin(Lines(), {}, config)
    for length in (12, 11, 12):
        play.step(Answer([1] * length, [0.0] * length), b"wait")
    assert play.episode.responses_at_limit == 2


# Sampling.


def test_stored_ids_are_the_sampled_ones(agent, monkeypatch):
    """A random model's tokens do not survive being decoded and tokenised again."""
    drawn, collect = {}, Engine.collect

    def recorded(engine):
        done = collect(engine)
        for key, answer in done:
            drawn.setdefault(key, []).append(answer)
        return done

    monkeypatch.setattr(Engine, "collect", recorded)
    t = play_tasks(agent, settings(max_turns=3), [{"seed": seed} for seed in range(4)], seed=5)
    answers = [answer for number in sorted(drawn) for answer in drawn[number]]
    assert [e.responses for e in t.episodes] == [
        [answer.ids for answer in drawn[number]] for number in range(4)
    ]
    texts = [agent.decode(answer.ids).decode(errors="replace") for answer in answers]
    again = agent.tokenizer(texts)["input_ids"]
    assert again != [answer.ids for answer in answers], "or the test says nothing"
    assert t.response_ids.tolist() == [i for answer in answers for i in answer.ids]
    logprobs = [x for answer in answers for x in answer.logprobs]
    assert t.old_logprobs.tolist() == pytest.approx(logprobs)


def test_the_same_seed_plays_the_same_episodes_however_many_at_once(agent):
    config, tasks = settings(max_turns=3), [{"seed": i} for i in range(5)]

    def responses(seed, **rollout):
        for name, value in rollout.items():
            setattr(config.rollout, name, value)
        return [e.responses for e in play_tasks(agent, config, tasks, seed=seed).episodes]

    assert responses(1) == responses(1) == responses(1, slots=2) == responses(1, slots=1)
    assert responses(1) != responses(2)


# Packing.


@pytest.mark.parametrize("lengths", [[], [0], [3], [1, 0, 4, 2], [0, 0]])
def test_prefix_sums(lengths):
    cu = prefix_sums(lengths)
    assert cu.dtype == torch.int32 and cu[0] == 0
    assert cu.diff().tolist() == lengths


@pytest.mark.parametrize(
    "a, b",
    [
        ([[1, 2], [3]], [[4], [5, 6, 7]]),
        ([[], [1]], [[2, 3], []]),
        ([[]], [[]]),
        ([], []),
        ([[1, 2, 3], [], [4]], [[], [], [5]]),
    ],
)
def test_interleave_joins_ranges(a, b):
    def packed(rows):
        return torch.tensor([x for row in rows for x in row], dtype=torch.int64), prefix_sums(
            [len(r) for r in rows]
        )

    joined, cu = interleave(*packed(a), *packed(b))
    rows = [joined[i:j].tolist() for i, j in zip(cu.tolist(), cu.tolist()[1:], strict=False)]
    assert rows == [x + y for x, y in zip(a, b, strict=True)]
    assert cu.dtype == torch.int32


def test_pack_holds_every_turn_once_in_order(agent):
    """The reference filled batches with duplicated turns, which its advantages counted twice."""
    wait, win = say(SWITCH, "go", "wait"), say(KEEP, "go", "win")
    _, episodes = run(agent, [[wait, win], [wait] * 3, [win]], max_turns=3)
    t = pack(episodes, agent.find_roles)
    assert t.turns == 6 and t.cu_turns.tolist() == [0, 2, 5, 6]
    sequences = t.sequences()
    ids, cu = sequences.ids, sequences.cu_seqlens
    rows = [ids[i:j].tolist() for i, j in zip(cu.tolist(), cu.tolist()[1:], strict=False)]
    stored = [(p, r) for e in episodes for p, r in zip(e.prompts, e.responses, strict=False)]
    assert rows == [p + r for p, r in stored]
    for row, a, b in zip(stored, t.cu_tokens.tolist(), t.cu_tokens.tolist()[1:], strict=False):
        assert t.response_ids[a:b].tolist() == row[1]
    assert t.switch.tolist() == [True, False, True, True, True, False]
    assert t.valid.all() and (t.roles > 0).sum() == t.roles.numel() - t.turns, (
        "all but the end tokens"
    )
    assert t.rewards.tolist() == [0.0, 10.0, 0.0, 0.0, 0.0, 10.0]


def test_pack_one_turn(agent):
    _, episodes = run(agent, [[say(SWITCH, "s", "win")]])
    t = pack(episodes, agent.find_roles)
    assert t.turns == 1 and t.final_ids.numel() == 0 and t.cu_final.tolist() == [0, 0]


# Figures.


def test_summary_of_a_batch_made_by_hand(agent):
    keep, switch, bad = say(KEEP, "s", "wait"), say(SWITCH, "s", "wait"), "what"
    scripts = [
        [keep, keep, switch, keep, switch],  # segments of 2, 2 and 1, cut off
        [switch, say(KEEP, "s", "win")],  # one segment of 2
        [bad, say(KEEP, "s", "lose")],  # one segment of 2, one invalid turn
    ]
    _, episodes = run(agent, scripts, max_turns=5)
    episodes[1].truncated_prompts = 4
    for episode, count in zip(episodes, (0, 2, 1), strict=True):
        episode.responses_at_limit = count
    t = pack(episodes, agent.find_roles)
    figures = summarise(t)
    assert figures["rollout/success"] == pytest.approx(1 / 3)
    assert figures["rollout/reward"] == pytest.approx(10 / 3), "per episode, not per turn"
    assert figures["rollout/turns"] == pytest.approx(9 / 3)
    assert figures["rollout/segment_length"] == pytest.approx(9 / 5)
    assert figures["rollout/switch_rate"] == pytest.approx(3 / 9)
    assert figures["rollout/valid_rate"] == pytest.approx(8 / 9)
    assert figures["rollout/truncated_prompts"] == 4
    assert figures["rollout/responses_at_limit"] == 3
    prompts = [len(p) for e in episodes for p in e.prompts[: len(e.responses)]]
    assert figures["rollout/prompt_tokens"] == pytest.approx(sum(prompts) / 9)
    assert figures["rollout/response_tokens"] == pytest.approx(
        sum(len(r) for e in episodes for r in e.responses) / 9
    )


def test_near_misses_are_counted_and_played_as_they_are(agent):
    actions = ["'win'", "`Win.`", '"wait 2".', "WIN'", "win not", "'", "", "wait 7", "win"]
    plays, episodes = run(agent, [[say(KEEP, "s", action) for action in actions], ["win"]])
    assert plays[0].env.told == [action.lower() for action in actions]
    assert [episode.near_misses for episode in episodes] == [4, 0]
    t = pack(episodes, agent.find_roles)
    assert summarise(t)["rollout/near_miss_rate"] == pytest.approx(4 / 10)


def test_groups_alike_by_hand(agent):
    win, lose, wait = (say(SWITCH, "s", action) for action in ("win", "lose", "wait"))
    _, episodes = run(agent, [[win], [wait, lose], [lose], [wait, win], [lose], [win]])
    for number, episode in enumerate(episodes):
        episode.group = number
    assert "rollout/groups_alike" not in summarise(pack(episodes, agent.find_roles))
    for episode, group in zip(episodes, [7, 3, 3, 7, 5, 5], strict=True):
        episode.group = group  # 7: both won; 3: both lost; 5: one of each
    t = pack(episodes, agent.find_roles)
    assert summarise(t)["rollout/groups_alike"] == pytest.approx(2 / 3)
    t.rewards[2] -= 0.1  # what shaping takes from one of group 3
    assert summarise(t)["rollout/groups_alike"] == pytest.approx(1 / 3)
    for episode, group in zip(episodes, [0, 0, 1, 2, 2, 3], strict=True):
        episode.group = group  # 1 and 3 are alone: no group of several
    assert summarise(pack(episodes, agent.find_roles))["rollout/groups_alike"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_groups_alike_as_a_plain_loop_counts_them(agent, seed):
    g = torch.Generator().manual_seed(seed)
    _, episodes = run(agent, [[say(SWITCH, "s", "wait")] * 2] * 13, max_turns=2)
    for episode in episodes:
        episode.group = int(torch.randint(0, 4, (), generator=g))
        episode.rewards = torch.randint(0, 2, (2,), generator=g).tolist()
    returns = {}
    for episode in episodes:
        returns.setdefault(episode.group, []).append(sum(episode.rewards))
    shared = [group for group in returns.values() if len(group) > 1]
    expected = sum(len(set(group)) == 1 for group in shared) / len(shared)
    found = summarise(pack(episodes, agent.find_roles))["rollout/groups_alike"]
    assert found == pytest.approx(expected)


def test_an_empty_episode_record_starts_with_nothing():
    first, second = Episode("t", "y"), Episode("t", "y")
    first.prompts.append([1])
    assert second.prompts == [] and not second.won and not second.terminated
