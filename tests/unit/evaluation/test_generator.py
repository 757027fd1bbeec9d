"""Answers in a batch against stock generation row by row, and sampling against the model's own distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.architecture_table import RECURRENT, recurrent
from tests.helpers.architectures import tiny
from trainer.config.schema import GenerateConfig, MethodConfig, ModelConfig
from trainer.data.templates.template import Template
from trainer.evaluation.generator import Generator
from trainer.methods import attach, trainable_parameters
from trainer.models.loading import load_model

CPU = torch.device("cpu")
PROMPTS = ["Say a.", "What is the capital of France?", "x", "Translate the sentence to Spanish: 中文 😀 " * 3]


@pytest.fixture
def prompts(tokenizer: Any) -> list[list[int]]:
    template = Template(tokenizer, "chat")
    return [template.encode_prompt(text) for text in PROMPTS]


def generator(model: Any, tokenizer: Any, end_ids: tuple[int, ...] = (), **keys: Any) -> Generator:
    return Generator(model, tokenizer, GenerateConfig(**keys), end_ids, CPU)


def stock_greedy(model: Any, prompt: list[int], tokens: int, end_ids: set[int]) -> list[int]:
    """No cache, no padding, no generate(): the likeliest next token, again and again."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in end_ids:
                break
            ids.append(token)
    return ids[len(prompt) :]


def test_a_greedy_batch_equals_each_row_alone(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    answers = generator(model, tokenizer, max_new_tokens=24).answer(prompts)
    assert answers == [stock_greedy(model, p, 24, {tokenizer.eos_token_id}) for p in prompts]
    assert [generator(model, tokenizer, max_new_tokens=24).answer([p])[0] for p in prompts] == answers
    for prompt, answer in zip(prompts, answers, strict=True):
        out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
        assert [t for t in out[0, len(prompt) :].tolist() if t != tokenizer.eos_token_id] == answer


def test_answers_end_at_every_end_token(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    free = generator(model, tokenizer, max_new_tokens=24).answer(prompts)
    middle = free[0][5]  # a token that the model does write, made an end token
    ends = generator(model, tokenizer, (middle,), max_new_tokens=24)
    assert ends.end_ids == sorted({middle, tokenizer.eos_token_id})
    for answer, whole in zip(ends.answer(prompts), free, strict=True):
        assert answer == (whole[: whole.index(middle)] if middle in whole else whole)
    model.generation_config.eos_token_id = [middle, 7]
    assert generator(model, tokenizer, (9,)).end_ids == sorted({middle, 7, 9})
    model.generation_config.eos_token_id = None
    assert generator(model, tokenizer, (9,)).end_ids == [9]


def test_max_new_tokens_and_pad_as_end(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    model.generation_config.eos_token_id = None
    answers = generator(model, tokenizer, max_new_tokens=3).answer(prompts)
    assert [len(a) for a in answers] == [3] * len(prompts)
    padded_with_end = generator(model, tokenizer, (tokenizer.pad_token_id,), max_new_tokens=24).answer(prompts)
    ends = {tokenizer.pad_token_id}
    assert padded_with_end == [stock_greedy(model, p, 24, ends) for p in prompts]


def test_the_caller_is_left_as_it_was(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    model.config.use_cache = False
    given = [list(p) for p in prompts]
    state = torch.get_rng_state()
    generator(model, tokenizer, max_new_tokens=4).answer(prompts)
    assert prompts == given
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.use_cache is False


def test_sampling_repeats_with_its_seed(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    draws = generator(model, tokenizer, max_new_tokens=12, do_sample=True)

    def with_seed(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return draws.answer(prompts)

    assert with_seed(0) == with_seed(0)
    assert with_seed(0) != with_seed(1)


@pytest.mark.parametrize("keys", [{"temperature": 1e-6}, {"top_p": 1e-3}])
def test_cold_or_narrow_sampling_is_greedy(
    model: Any, tokenizer: Any, prompts: list[list[int]], keys: dict[str, float]
) -> None:
    greedy = generator(model, tokenizer, max_new_tokens=8).answer(prompts)
    assert generator(model, tokenizer, max_new_tokens=8, do_sample=True, **keys).answer(prompts) == greedy


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.6), (1.5, 0.8)])
def test_samples_follow_the_distribution(model: Any, tokenizer: Any, temperature: float, top_p: float) -> None:
    """The first token of many answers, by chi-square at five deviations; no other cut than the ones asked for."""
    model.generation_config.eos_token_id = None
    model.generation_config.top_k = 3  # the model's authors' taste is not what was asked for
    prompt, draws = [5, 6, 7], 6000
    keys = {"max_new_tokens": 1, "do_sample": True, "temperature": temperature, "top_p": top_p}
    torch.manual_seed(0)
    found = [a[0] for a in generator(model, tokenizer, **keys).answer([prompt] * draws)]
    with torch.no_grad():
        law = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / temperature, -1)
    ordered, order = law.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < top_p
    law[order[~kept]] = 0
    law /= law.sum()
    counts = torch.bincount(torch.tensor(found), minlength=len(law)).double()
    assert not counts[law == 0].any()
    often = law * draws >= 5
    statistic = float(((counts - law * draws) ** 2 / (law * draws))[often].sum())
    freedom = int(often.sum())
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    rare = float(law[~often].sum())
    assert abs(float(counts[~often].sum()) / draws - rare) < 5 * (rare / draws) ** 0.5 + 1e-9


def test_decode_leaves_control_tokens_out(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("hola", add_special_tokens=False).input_ids
    assert generator(model, tokenizer).decode([*ids, tokenizer.eos_token_id]) == "hola"


def test_the_output_layer_gets_no_slice_with_gaps(tiny_model: Path, tokenizer: Any, prompts: list[list[int]]) -> None:
    """torch copies the whole vocabulary matrix once a row for such a slice."""
    model: Any = load_model(str(tiny_model), ModelConfig(), MethodConfig(), torch.float32, CPU, zero_stage=2)
    seen: list[bool] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    generator(model.eval(), tokenizer, max_new_tokens=2).answer(prompts)
    assert len(seen) == 2
    assert all(seen)


def test_what_the_template_opens_an_answer_with_is_cut_off(model: Any, tokenizer: Any) -> None:
    cut = Generator(model, tokenizer, GenerateConfig(), (), CPU, opening_ids=[7, 8]).cut_opening
    assert [cut(ids) for ids in ([], [7], [7, 8], [7, 8, 9])] == [[], [], [], [9]]
    assert cut([5, 7, 9]) == [5, 7, 9]
    assert cut([3, 7, 8, 4, 7, 8, 9, 6]) == [9, 6]  # a channel for thoughts came first
    assert generator(model, tokenizer).cut_opening([7, 8, 9]) == [7, 8, 9]


def test_an_answer_is_streamed_without_its_opening(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    whole = generator(model, tokenizer, max_new_tokens=12).answer(prompts[:1])[0]
    opened = Generator(model, tokenizer, GenerateConfig(max_new_tokens=12), (), CPU, opening_ids=whole[:3])
    written: list[str] = []
    text, _ = opened.stream(prompts[0], written.append)
    expected = opened.decode(opened.cut_opening(whole))
    assert "".join(written) == text == expected
    assert opened.answer(prompts[:1]) == [opened.cut_opening(whole)]


RECURRENT_PROMPTS = [[5, 9, 12, 7, 30, 21, 8], [6, 11], [17, 4, 33, 29, 13]]


@pytest.mark.parametrize("name", RECURRENT)
def test_prompts_of_a_model_with_a_state_are_answered_as_each_alone(name: str, tokenizer: Any) -> None:
    """Padding on the left would go through the state of some; biases and the padding's embedding are not zero here."""
    torch.manual_seed(0)
    model = recurrent(name).eval()
    answering = generator(model, tokenizer, max_new_tokens=12)
    answering.pad_id, answering.end_ids = 0, [1]
    assert answering.reads_padding == (name == "recurrent_gemma")
    alone = [answering.answer([prompt])[0] for prompt in RECURRENT_PROMPTS]
    assert answering.answer(RECURRENT_PROMPTS) == alone
    if answering.reads_padding:
        answering.reads_padding = False
        assert answering.answer(RECURRENT_PROMPTS) != alone, "these rows show what padding does"


@pytest.mark.parametrize(
    ("name", "method", "reads"),
    [
        ("mamba2", "prompt", True),
        ("falcon_h1", "prompt", True),
        ("llama", "prompt", True),
        ("llama", "prefix", False),
        ("gpt2", "prefix", False),
        ("mistral, window 8", "prefix", True),
    ],
)
def test_virtual_tokens_stand_right_before_each_prompt(name: str, method: str, reads: bool, tokenizer: Any) -> None:
    torch.manual_seed(0)
    base = recurrent(name) if name in RECURRENT else tiny(name)
    prefix = {"prefix_projection": False} if method == "prefix" else {}
    model = attach(base, MethodConfig(name=method, virtual_tokens=4, **prefix), seed=0).eval()
    for parameter in trainable_parameters(model).values():
        parameter.data.normal_()
    answering = generator(model, tokenizer, max_new_tokens=12)
    answering.pad_id, answering.end_ids = 0, [1]
    assert answering.reads_padding == reads
    alone = [answering.answer([prompt])[0] for prompt in RECURRENT_PROMPTS]
    assert answering.answer(RECURRENT_PROMPTS) == alone
    if reads:
        answering.reads_padding = False
        assert answering.answer(RECURRENT_PROMPTS) != alone, "these rows show what padding does"
