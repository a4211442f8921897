"""Chat templates of many kinds, and BOS: what the model reads, by turns and in a transcript, or why it cannot."""

import pytest
from helpers import HOUSEHOLD
from test_prompter import state
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hiper_fast.agent import tiny
from hiper_fast.config import AgentConfig
from hiper_fast.configure import resolve
from hiper_fast.envs.alfworld.prompts import STYLES
from hiper_fast.options import ConfigError
from hiper_fast.rollout.prompter import Prompter
from hiper_fast.runs.folder import format_config
from hiper_fast.study import name_imitation

QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ content + '<|end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|im_start|>system\\nToday: ' + date_string + '<|end|>' }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n\\n' + message.content | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"""
MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- else %}{{ raise_exception('only user and assistant roles') }}
    {%- endif %}
{%- endfor %}"""
LLAMA2 = MISTRAL.replace(
    "message.content + eos_token", "message.content + ' ' + eos_token + bos_token"
)
SOUND = {"qwen3": QWEN3, "llama3": LLAMA3, "mistral": MISTRAL, "llama2": LLAMA2}

EACH = "{% for m in messages%s %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}<|im_start|>assistant\n"
ONE = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}"
UNSOUND = {
    "the last message alone": (EACH.replace("%s", "[-1:]"), "does not render every message once"),
    "the last three messages": (EACH.replace("%s", "[-3:]"), "does not render every message once"),
    "no answers": (
        EACH.replace("%s", " if m.role == 'user'"),
        "does not render every message once",
    ),
    "everything twice": (EACH.replace("%s", " + messages"), "does not render every message once"),
    "a line before the last message": (
        EACH.replace("%s", "").replace("{{ m.role", "{{ 'Now: ' if loop.last }}{{ m.role"),
        "renders an earlier prompt otherwise than it was read",
    ),
    "a count of questions": (
        EACH.replace("%s", "").replace(
            "{{ m.role", "{{ loop.index if m.role == 'user' }}{{ m.role"
        ),
        "renders a prompt by what came long before it",
    ),
    "one message": (ONE + EACH.replace("%s", ""), "fails on a conversation: one message only"),
}


def make_tokenizer(template=None, bos=True):
    """The tiny tokenizer with a BOS, that it puts before a text where `bos` is true."""
    tokenizer = tiny.load_tokenizer(HOUSEHOLD.tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)])
    if bos:
        backend = tokenizer.backend_tokenizer
        backend.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = template
    return tokenizer


def make_prompter(tokenizer, style="transcript", **options):
    config = {"style": style, "max_prompt_tokens": 4000, "history": 8, **options}
    return Prompter(tokenizer, AgentConfig(**config), STYLES[style])


def converse(prompter, said, ended=True):
    """The ids of a conversation in which the agent says this, as the rollout puts them together."""
    context = []
    for turn, text in enumerate(said):
        [(ids, truncated)] = prompter(
            [state(context=list(context), observation=f"saw pan {turn}.")]
        )
        assert not truncated and ids
        context += ids + prompter.tokenizer(text, add_special_tokens=False)["input_ids"]
        context += [prompter.tokenizer.eos_token_id] * ended
    return context


def render(prompter, said):
    """The text that the template makes of the same conversation."""
    messages, context = [], []
    for turn, text in enumerate(said):
        asked = STYLES["transcript"].render(state(context=context, observation=f"saw pan {turn}."))
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        context = [0]
    template = prompter.tokenizer.apply_chat_template
    return template(messages, tokenize=False, **prompter.config.chat_template)


# BOS.


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_without_template_begins_as_its_tokenizer_begins_a_text(style):
    with_bos, without = (make_prompter(make_tokenizer(bos=bos), style) for bos in (True, False))
    [(ids, _)], [(bare, _)] = with_bos([state()]), without([state()])
    assert ids == [with_bos.tokenizer.bos_token_id, *bare]
    text = STYLES[style].render(state())
    assert ids == with_bos.tokenizer(text)["input_ids"]
    assert bare == without.tokenizer(text)["input_ids"]


def test_a_saved_tokenizer_begins_as_before(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    [(ids, _)] = make_prompter(tokenizer)([state()])
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_a_sentencepiece_like_tokenizer_begins_with_its_bos():
    letters = ["<s>", "</s>", *map(chr, range(33, 127)), "▁", "<0x0A>"]
    vocab = {letter: i for i, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="</s>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    [(ids, _)] = make_prompter(tokenizer)([state()])
    assert ids == tokenizer(STYLES["transcript"].render(state()))["input_ids"] and ids[:2] == [
        0,
        vocab["▁"],
    ]
    context = converse(make_prompter(tokenizer), ["<action>look</action>"] * 3)
    assert context.count(0) == 1 and context.count(1) == 3


def test_a_tokenizer_that_only_ends_texts_begins_none():
    tokenizer = make_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    [(ids, _)] = make_prompter(tokenizer)([state()])
    assert ids == tokenizer(STYLES["transcript"].render(state()))["input_ids"][:-1]


@pytest.mark.parametrize("ended", [True, False])
def test_a_plain_conversation_has_one_bos(ended):
    prompter = make_prompter(make_tokenizer())
    ids = converse(prompter, ["<action>look</action>"] * 3, ended)
    assert ids[0] == prompter.tokenizer.bos_token_id and ids.count(ids[0]) == 1
    assert ids.count(prompter.tokenizer.eos_token_id) == 2 + ended


@pytest.mark.parametrize("name", ["llama3", "mistral"])
@pytest.mark.parametrize("style", STYLES)
def test_a_template_that_writes_bos_gets_no_other(name, style):
    prompter = make_prompter(make_tokenizer(SOUND[name]), style)
    [(ids, _)] = prompter([state()])
    assert ids[0] == prompter.tokenizer.bos_token_id and ids.count(ids[0]) == 1
    if style == "transcript":
        assert converse(prompter, ["<action>look</action>"] * 3).count(ids[0]) == 1


def test_a_template_without_bos_stays_without():
    prompter = make_prompter(make_tokenizer(QWEN3))
    assert prompter.tokenizer.bos_token_id not in prompter([state()])[0][0]


@pytest.mark.parametrize("template", [None, LLAMA3], ids=["plain", "chat"])
@pytest.mark.parametrize("limit", [1, 2, 30])
def test_bos_stays_where_the_rest_is_cut(template, limit):
    prompter = make_prompter(make_tokenizer(template), max_prompt_tokens=limit)
    [(ids, truncated)] = prompter([state(task="x " * 900)])
    assert truncated and len(ids) == limit and ids[0] == prompter.tokenizer.bos_token_id


# Conversations.

SAID = [
    "<think>hm</think>\n\n<action>look</action>",
    "<action>go to shelf 1</action>",
    "<action>help</action>",
]


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "cut"])
@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_prompts_and_responses_are_the_templates_own_conversation(name, ended):
    prompter = make_prompter(make_tokenizer(SOUND[name]))
    text = prompter.tokenizer.decode(converse(prompter, SAID, ended))
    whole = render(prompter, SAID)
    if name == "mistral":
        whole = whole.replace("[/INST] ", "[/INST]")  # the blank is the model's to say, or not
    assert text == (whole if ended else whole.removesuffix("<|end|>"))


@pytest.mark.parametrize("name", SOUND)
def test_an_end_token_that_was_sampled_is_not_said_again(name):
    prompter = make_prompter(make_tokenizer(SOUND[name]))
    end = prompter.tokenizer.eos_token
    for ended in (True, False):
        text = prompter.tokenizer.decode(converse(prompter, SAID, ended))
        for said in SAID[:-1]:
            after = text.partition(said)[2].lstrip()
            assert after.startswith(end) and not after.removeprefix(end).lstrip().startswith(end)


@pytest.mark.parametrize("thinking", [None, False, True])
def test_what_was_thought_stays_as_it_was_read(thinking):
    options = {} if thinking is None else {"enable_thinking": thinking}
    prompter = make_prompter(make_tokenizer(QWEN3), chat_template=options)
    text = prompter.tokenizer.decode(converse(prompter, SAID))
    assert SAID[0] in text
    assert text.count("assistant\n<think>\n\n</think>\n\n") == (3 if thinking is False else 0)
    bare = text.replace("assistant\n<think>\n\n</think>\n\n", "assistant\n")
    assert bare.replace("<think>hm</think>\n\n", "") + "\n" == render(prompter, SAID)


@pytest.mark.parametrize("name", UNSOUND)
def test_templates_that_cannot_go_on_are_refused_for_transcripts_alone(name):
    template, fault = UNSOUND[name]
    if name != "everything twice":
        [(ids, _)] = make_prompter(make_tokenizer(template), "reference")([state()])
        assert ids
    with pytest.raises(ConfigError, match=f"{fault}; use agent.style: reference"):
        make_prompter(make_tokenizer(template))


def test_a_template_that_refuses_a_users_message_says_so():
    template = "{{ raise_exception('the first message must be a system message') }}"
    with pytest.raises(
        ConfigError, match="model.path: .* the first message must be a system message"
    ):
        make_prompter(make_tokenizer(template), "reference")
    for options in ({}, {"enable_thinking": False}):
        with pytest.raises(
            ConfigError, match="model.path: its chat template fails on a user message"
        ):
            make_prompter(make_tokenizer("{% if %}"), "reference", chat_template=options)
    with pytest.raises(ConfigError, match="leaves out what the user says"):
        make_prompter(
            make_tokenizer("{% for m in messages %}{{ m.content[0].text }}{% endfor %}"),
            "reference",
        )


# Options of the template.


@pytest.mark.parametrize("style", STYLES)
def test_the_template_is_given_its_options(style):
    def write(template, **options):
        prompter = make_prompter(make_tokenizer(template), style, chat_template=options)
        return prompter.tokenizer.decode(prompter([state()])[0][0])

    empty = "<think>\n\n</think>\n\n"
    assert write(QWEN3, enable_thinking=False) == write(QWEN3) + empty
    assert write(QWEN3, enable_thinking=True) == write(QWEN3)
    assert "Today: 26 Jul 2024" in write(LLAMA3, date_string="26 Jul 2024")


@pytest.mark.parametrize(
    "template, options, told",
    [
        (QWEN3, {"enable_thinkin": False}, "'enable_thinkin'; did you mean enable_thinking?"),
        (QWEN3, {"date": "now"}, "never reads 'date'; it reads"),
        (MISTRAL, {"enable_thinking": False}, "'enable_thinking'; it reads no option at all"),
        (LLAMA3, {"messages": []}, "'messages'; it reads date_string"),
        (LLAMA3, {"bos_token": ""}, "'bos_token'; it reads date_string"),
        (LLAMA3, {"tokenize": True}, "'tokenize'; it reads date_string"),
        (None, {"enable_thinking": False}, "no chat template to read enable_thinking"),
    ],
)
def test_an_option_that_the_template_never_reads_is_refused_by_name(template, options, told):
    with pytest.raises(ConfigError, match="agent.chat_template: .*") as error:
        make_prompter(make_tokenizer(template), "reference", chat_template=options)
    assert told in str(error.value)


def test_a_template_that_fails_on_its_options_says_so():
    with pytest.raises(ConfigError, match="model.path: its chat template fails on a user message"):
        make_prompter(make_tokenizer(LLAMA3), "reference", chat_template={"date_string": 5})


def test_options_of_the_template_are_saved_and_tell_warm_starts_apart(tmp_path):
    given = {"env.name": "household", "model.device": "cpu"}
    plain = resolve(given=given)
    named = "{enable_thinking: false, date_string: 26 Jul 2024}"
    config = resolve(given={**given, "agent.chat_template": named})
    assert config.agent.chat_template == {"enable_thinking": False, "date_string": "26 Jul 2024"}
    file = tmp_path / "config.yaml"
    file.write_text(format_config(config))
    assert resolve([file]).agent == config.agent and plain.agent.chat_template == {}
    assert name_imitation(config) != name_imitation(plain)


@pytest.mark.parametrize(
    "value",
    [
        "thinking",
        "[thinking]",
        "{thinking: false",
        "{1: 2}",
        "{date: 2024-07-26}",
        3,
        {"x": {1: 2}},
    ],
)
def test_what_is_no_mapping_is_refused(value):
    told = r"command line: agent.chat_template: expected a mapping .*\{name: value\}"
    with pytest.raises(ConfigError, match=told):
        resolve(given={"env.name": "household", "agent.chat_template": value})


def test_runs_of_a_study_are_given_them_whole():
    pytest.importorskip("scipy")
    from hiper_fast.compare import spell_value

    options = {"enable_thinking": False, "words": ["it's", None, 1.5], "deep": {"a,b": "c: d"}}
    for given in (options, {}):
        said = {"env.name": "household", "agent.chat_template": spell_value(given)}
        assert resolve(given=said).agent.chat_template == given
