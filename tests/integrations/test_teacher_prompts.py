"""Prompts that teachers and the reference read in place of the student's, in both trainers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", minversion="1.16")
peft = pytest.importorskip("peft")

import fused_gopd as fg  # noqa: E402
from fused_gopd.integrations.trl import GOPDTrainer, GRPOGOPDConfig, GRPOGOPDTrainer  # noqa: E402
from fused_gopd.integrations.trl.batch import Batch  # noqa: E402
from fused_gopd.integrations.trl.frozen import Given  # noqa: E402
from test_cross_tokenizer import permuted, with_other_ids  # noqa: E402
from test_trl import PROMPTS, SGD, assert_same, config, lengths, model, prompts, tokenizer, weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}{% if add_generation_prompt %}a: {% endif %}"


def hint(row: dict[str, Any]) -> str:
    return f"one two three {row['prompt']} four"


def context(row: dict[str, Any]) -> str:
    return f"sat on {row['prompt']}"


def speaking() -> Any:
    made = tokenizer()
    made.chat_template = CHAT
    return made


def trainer(folder: Path, kind: type = GOPDTrainer, data: Any = None, **arguments: Any) -> Any:
    """A trainer; what its configuration and its constructor know go where they belong."""
    names = ("teacher", "ref_model", "teacher_prompt", "ref_prompt", "teacher_processing_class", "peft_config")
    names += ("eval_dataset", "reward_funcs")
    own = {name: arguments.pop(name) for name in names if name in arguments}
    own = {"teacher": model(1, hidden=48), "ref_model": model(2), **own}
    student, words = arguments.pop("student", None), arguments.pop("tokenizer", None)
    options = {"kind": GRPOGOPDConfig, "num_generations": 2, "beta": 0.0} if kind is GRPOGOPDTrainer else {}
    return kind(
        model(0) if student is None else student,
        args=config(folder, **{"reward_scale": 1.25, **options, **arguments}),
        train_dataset=prompts() if data is None else data,
        processing_class=words or tokenizer(),
        **own,
    )


def batch_of(run: Any, rows: list[dict[str, Any]]) -> Batch:
    return Batch.from_trl(run._generate_and_score_completions(rows))


def answers(batch: Batch) -> list[list[int]]:
    """The completions without padding."""
    return [ids[live.bool()].tolist() for ids, live in zip(batch.token_ids, batch.completion_mask, strict=True)]


def by_hand(of: Any, texts: list[Any], completions: list[list[int]], words: Any = None) -> list[Tensor]:
    """(K, V) log-probs at each completion's tokens, from the model's own logits: one sequence at a time, no padding."""
    words, found = words or tokenizer(), []
    for text, completion in zip(texts, completions, strict=True):
        if not isinstance(text, str):
            text = words.apply_chat_template(text, add_generation_prompt=True, tokenize=False)
        front = words(text)["input_ids"]
        logits = of(input_ids=torch.tensor([[*front, *completion]])).logits[0]
        found.append(logits[len(front) - 1 : -1].log_softmax(-1))
    return found


def assert_scores(found: Tensor, batch: Batch, want: list[Tensor], tolerance: float = 1e-4) -> None:
    """Of the sampled tokens."""
    for row, (of_row, completion) in enumerate(zip(want, answers(batch), strict=True)):
        exact = of_row.gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(found[row][batch.completion_mask[row].bool()], exact, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_loss_and_gradient_are_those_of_each_model_after_its_own_prompt(tmp_path: Path, scale: float) -> None:
    """In float64, against logits of unpadded sequences: p (log p - lambda log q - (1 - lambda) log r) at its tokens."""
    student, teacher, ref = model(0).double(), model(1, hidden=48).double(), model(2).double()
    run = trainer(tmp_path, student=student, teacher=teacher, ref_model=ref, reward_scale=scale, backend="torch",
                  teacher_prompt=hint, ref_prompt=context)  # fmt: skip
    batch = batch_of(run, [{"prompt": text} for text in PROMPTS[:4]])
    assert len({len(x) for x in answers(batch)}) > 1
    out = run._loss(run.model, batch)
    out.loss.backward()
    rows = [{"prompt": text} for text in PROMPTS[:4]]
    p = by_hand(student, PROMPTS[:4], answers(batch))
    with torch.no_grad():
        q = by_hand(teacher, [hint(row) for row in rows], answers(batch))
        r = by_hand(ref, [context(row) for row in rows], answers(batch))
    losses = []
    for of_p, of_q, of_r in zip(p, q, r, strict=True):
        target = scale * of_q + (1 - scale) * of_r
        losses.append((of_p.exp() * (of_p - target)).sum(-1))
    dense = torch.cat(losses).mean()
    torch.testing.assert_close(out.loss, dense, rtol=1e-9, atol=1e-9)
    ours = {name: x.grad.clone() for name, x in student.named_parameters()}
    student.zero_grad()
    dense.backward()
    assert_same(ours, {name: x.grad for name, x in student.named_parameters()}, 1e-9)
    assert_scores(out.teacher_logprobs, batch, q, 1e-9)
    if scale != 1:
        assert_scores(out.ref_logprobs, batch, r, 1e-9)


def test_a_column_is_the_function_that_returns_it(tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in PROMPTS]
    data = prompts(longer=[hint(row) for row in rows], other=[context(row) for row in rows])
    by_function = trainer(tmp_path, teacher_prompt=hint, ref_prompt=context, **SGD)
    by_function.train()
    by_column = trainer(tmp_path, teacher_prompt_column="longer", ref_prompt_column="other", data=data,
                        remove_unused_columns=True, **SGD)  # fmt: skip
    by_column.train()
    plain = trainer(tmp_path, **SGD)
    plain.train()
    assert_same(weights(by_column), weights(by_function))
    assert max((x - y).abs().max() for x, y in zip(weights(plain).values(), weights(by_function).values(),
                                                   strict=True)) > 1e-4  # fmt: skip


def test_the_student_s_own_prompt_changes_nothing(tmp_path: Path) -> None:
    """But the width of the padding, which TRL makes that of all accumulated batches: rounding in float32."""
    own = trainer(tmp_path, teacher_prompt=lambda row: row["prompt"], ref_prompt=lambda row: row["prompt"], **SGD)
    own.train()
    plain = trainer(tmp_path, **SGD)
    plain.train()
    assert_same(weights(own), weights(plain), 1e-6)


def test_messages_and_texts_may_be_mixed(tmp_path: Path) -> None:
    """A system prompt for some rows and a text for others, where the student reads messages."""

    def told(row: dict[str, Any]) -> Any:
        if row["plain"]:
            return "numbers one two"
        row["prompt"].insert(0, {"role": "system", "content": "the cat sat"})  # the row is a copy
        return row["prompt"]

    words, teacher = speaking(), model(1, hidden=48)
    rows = [{"prompt": [{"role": "user", "content": text}], "plain": i % 2} for i, text in enumerate(PROMPTS[:4])]
    run = trainer(tmp_path, teacher=teacher, teacher_prompt=told, tokenizer=words)
    batch = batch_of(run, rows)
    assert all(len(row["prompt"]) == 1 for row in rows)
    read = [told(copy.deepcopy(row)) for row in rows]
    assert_scores(run._loss(run.model, batch).teacher_logprobs, batch, by_hand(teacher, read, answers(batch), words))


def test_a_function_of_two_arguments_gets_the_answer(tmp_path: Path) -> None:
    """A parameter with a default is no such argument."""
    teacher, words, seen = model(1, hidden=48), tokenizer(), list[str]()

    def told(row: dict[str, Any], answer: str, before: str = "cat") -> str:
        seen.append(answer)
        return f"{before} {answer} {row['prompt']}"

    def plain(row: dict[str, Any], before: str = "mat") -> str:
        return f"{before} {row['prompt']}"

    run = trainer(tmp_path, teacher=teacher, teacher_prompt=told, ref_prompt=plain)
    batch = batch_of(run, [{"prompt": text} for text in PROMPTS[:4]])
    assert seen == [words.decode(ids, skip_special_tokens=True) for ids in answers(batch)]
    out = run._loss(run.model, batch)
    read = [f"cat {answer} {text}" for answer, text in zip(seen, PROMPTS, strict=False)]
    assert_scores(out.teacher_logprobs, batch, by_hand(teacher, read, answers(batch)))
    read = [f"mat {text}" for text in PROMPTS[:4]]
    assert_scores(out.ref_logprobs, batch, by_hand(run._reference.model, read, answers(batch)))


def test_the_card_names_what_is_read(tmp_path: Path) -> None:
    routed = {"teacher": {"a": model(1)}, "route_column": "domain", "data": prompts(domain=["a"] * 8, other=PROMPTS)}
    run = trainer(tmp_path, **routed, teacher_prompt={"a": hint}, ref_prompt_column="other")
    run.create_model_card()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| teacher_prompt | the function hint of 'a' |\n| ref_prompt | column 'other' |\n" in text


def test_each_route_may_have_a_prompt_of_its_own(tmp_path: Path) -> None:
    """A route without one reads the student's."""
    teachers = {"a": model(1, hidden=48), "b": model(3), "c": model(4)}
    routes = ["a", "b", "c", "a"]
    run = trainer(tmp_path, teacher=teachers, route_column="domain", data=prompts(domain=[*routes, *routes]),
                  teacher_prompt={"a": hint, "b": context})  # fmt: skip
    rows = [{"prompt": text, "domain": route} for text, route in zip(PROMPTS, routes, strict=False)]
    batch = batch_of(run, rows)
    out = run._loss(run.model, batch)
    functions: dict[str, Any] = {"a": hint, "b": context, "c": lambda row: row["prompt"]}
    want = []
    for row, completion in zip(rows, answers(batch), strict=True):
        route = row["domain"]
        want += by_hand(teachers[route], [functions[route](row)], [completion])
    assert_scores(out.teacher_logprobs, batch, want)
    assert_scores(out.ref_logprobs, batch, by_hand(run._reference.model, PROMPTS[:4], answers(batch)))


@pytest.mark.parametrize("multiple", [None, 8])
def test_a_model_reads_no_more_padding_than_its_own_prompts_need(tmp_path: Path, multiple: int | None) -> None:
    """Neither another route's long prompt nor one of another part of the batch."""
    far, near, widths = model(1), model(3), list[int]()
    far.config.max_position_embeddings = 512
    near.model.register_forward_pre_hook(
        lambda _, args, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    functions = {"a": lambda row: "cat " * 60, "b": lambda row: row["told"]}
    data = prompts(domain=["a", "b"] * 4, told=["cat"] * 8)
    run = trainer(tmp_path, teacher={"a": far, "b": near}, route_column="domain", data=data, teacher_prompt=functions,
                  pad_to_multiple_of=multiple)  # fmt: skip
    told = ["", "cat", "", "cat cat cat sat on the mat"]
    rows = [{"prompt": text, "domain": route, "told": t} for text, route, t in zip(PROMPTS, "abab", told, strict=False)]
    batch = batch_of(run, rows)
    keep, words = batch.token_ids.shape[1], tokenizer()
    want = [len(words(text)["input_ids"]) for text in (told[1], told[3], told[3])]
    for part in (*batch.split(2), batch):
        out = run._loss(run.model, part)
    step = multiple or 1
    assert widths == [-(-length // step) * step + keep for length in want]
    read = ["cat " * 60 if row["domain"] == "a" else row["told"] for row in rows]
    found = [by_hand(far if row["domain"] == "a" else near, [text], [x])[0]
             for row, text, x in zip(rows, read, answers(batch), strict=True)]  # fmt: skip
    assert_scores(out.teacher_logprobs, batch, found)


def test_the_base_of_an_adapter_reads_the_reference_s_prompt(tmp_path: Path) -> None:
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    runs = []
    for ref in ("base", model(0)):
        run = trainer(tmp_path, peft_config=lora, ref_model=ref, ref_prompt=context, max_steps=3, **SGD)
        run.train()
        runs.append(weights(run))
    assert_same(*runs, 1e-6)


def test_a_scorer_gets_the_teacher_s_prompt(tmp_path: Path) -> None:
    teacher = model(1, hidden=48).eval()

    def scorer(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> fg.TokenLogProbs:
        with torch.no_grad():
            logits = teacher(input_ids=input_ids, attention_mask=attention_mask).logits
        head = fg.Logits(logits[:, -completion_mask.shape[1] - 1 : -1])
        return fg.TokenLogProbs(fg.token_logprobs(head, input_ids[:, -completion_mask.shape[1] :]))

    runs = []
    for source in (teacher, scorer):
        run = trainer(tmp_path, teacher=source, teacher_prompt=hint, estimator="sampled", **SGD)
        run.train()
        runs.append(weights(run))
    assert_same(*runs, 1e-6)


def test_the_cache_tells_prompts_apart(tmp_path: Path) -> None:
    """Both models are one file: what differs is what they read."""
    model(2).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    options = {"teacher": str(tmp_path / "model"), "ref_model": str(tmp_path / "model"), "teacher_prompt": hint}
    runs = []
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        run = trainer(tmp_path, **options, teacher_cache=cache, **SGD)
        run.train()
        runs.append(weights(run))
    assert run.state.log_history[0]["gopd/cache_hits"] == 1
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


def test_a_scorer_is_asked_about_the_student_s_tokens_after_its_own_prompt(tmp_path: Path) -> None:
    teacher = model(1, hidden=48).eval()

    def scorer(
        input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, token_ids: Tensor
    ) -> fg.TopKLogProbs:
        with torch.no_grad():
            logits = teacher(input_ids=input_ids, attention_mask=attention_mask).logits
        head = fg.Logits(logits[:, -completion_mask.shape[1] - 1 : -1])
        return fg.TopKLogProbs(token_ids, fg.selected_logprobs(head, token_ids))

    runs = []
    for source in (teacher, scorer):
        run = trainer(tmp_path, teacher=source, teacher_prompt=hint, estimator="topk", k=4, support="student", **SGD)
        run.train()
        runs.append(weights(run))
    assert_same(*runs, 1e-6)


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_a_teacher_with_a_tokenizer_of_its_own_reads_its_own_prompt(tmp_path: Path, estimator: str) -> None:
    """The same model under other ids; messages for its own template, which the student's tokenizer does not have."""
    other, order = permuted(tokenizer())
    other.chat_template = CHAT
    size = len(tokenizer())

    def told(row: dict[str, Any]) -> Any:
        return [{"role": "system", "content": "the cat"}, {"role": "user", "content": row["prompt"]}]

    def spelled(row: dict[str, Any]) -> str:
        return str(other.apply_chat_template(told(row), add_generation_prompt=True, tokenize=False))

    runs = []
    for teacher, prompt, words in (
        (with_other_ids(1, size, order), told, other),
        (model(1, vocab=size), spelled, None),
    ):
        student = model(0, vocab=size)
        student.generation_config.eos_token_id = teacher.generation_config.eos_token_id = 0
        run = trainer(tmp_path, student=student, teacher=teacher, ref_model=None, reward_scale=1.0, estimator=estimator,
                      teacher_prompt=prompt, cross_tokenizer=words is not None, teacher_processing_class=words,
                      generation_kwargs={"suppress_tokens": [i for i, t in enumerate(range(size)) if i < 2 or not
                                         tokenizer().decode([t]).isascii()]}, **SGD)  # fmt: skip
        run.train()
        runs.append(weights(run))
    assert_same(*runs, 1e-5)


def test_grpo_scores_after_each_model_s_own_prompt(tmp_path: Path) -> None:
    teacher, ref = model(1, hidden=48), model(2)
    run = trainer(tmp_path, GRPOGOPDTrainer, teacher=teacher, ref_model=ref, reward_funcs=lengths, outcome_weight=0.0,
                  teacher_prompt=hint, ref_prompt=context)  # fmt: skip
    rows = [{"prompt": text} for text in PROMPTS[:2] for _ in range(2)]
    output = run._generate_and_score_completions(rows)
    batch = Batch.from_trl(output)
    with torch.no_grad():
        p = by_hand(run.model, [row["prompt"] for row in rows], answers(batch))
        q = by_hand(teacher, [hint(row) for row in rows], answers(batch))
        r = by_hand(ref, [context(row) for row in rows], answers(batch))
    advantages = [1.25 * (of_q - of_r) - (of_p - of_r) for of_p, of_q, of_r in zip(p, q, r, strict=True)]
    assert_scores(output["advantages"], batch, advantages)
    run.train()


# ------------------------------------------------------------------------------------------------------------- errors


def test_wrong_arguments_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    for error, options in {
        "teacher_prompt and teacher_prompt_column='x' both name a prompt": {"teacher_prompt_column": "x"},
        "teacher_prompt must be a function of a row .* got str": {"teacher_prompt": "a text"},
        "a dict of teacher_prompt needs route_column": {"teacher_prompt": {"a": hint}},
        "ref_prompt is what the reference reads, and no ref_model": {"ref_prompt": hint, "ref_model": None},
    }.items():
        with pytest.raises((ValueError, TypeError), match=error):
            trainer(tmp_path, **{"teacher_prompt": hint, "reward_scale": 1.0, **options})
    for column in ("teacher_prompt_column", "ref_prompt_column"):
        with pytest.raises(ValueError, match=rf"train_dataset has no column 'hint' \({column}\), only prompt"):
            trainer(tmp_path, **{column: "hint"})
    with pytest.raises(ValueError, match=r"eval_dataset has no column 'hint' \(teacher_prompt_column\)"):
        trainer(tmp_path, teacher_prompt_column="hint", data=prompts(hint=PROMPTS), eval_dataset=prompts())
    routed = {"teacher": {"a": model(1)}, "route_column": "domain", "data": prompts(domain=["a"] * 8)}
    for given, error in (({"b": hint}, r"no teacher for the route 'b', which is in teacher_prompt"), ({}, "one route")):
        with pytest.raises(ValueError, match=error):
            trainer(tmp_path, **routed, teacher_prompt=given)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (lambda row: row["hint"], "teacher_prompt raised KeyError: 'hint', for a row with the columns prompt"),
        (lambda row: None, "teacher_prompt must be a text, or a list of messages with role and content, got None"),
        (lambda row: [row["prompt"]], r"teacher_prompt must be a text, or a list .* got \['the cat'\]"),
        (lambda row: "", "teacher_prompt gives a prompt without tokens: ''"),
        (lambda row: [{"role": "user", "content": [{"type": "image"}]}], "must have texts alone, got .* 'image'"),
        (lambda row: "cat " * 60, r"have \d+ tokens, and teacher has 64 positions"),
    ],
)
def test_wrong_prompts_are_named_when_they_come(tmp_path: Path, prompt: Any, error: str) -> None:
    run = trainer(tmp_path, teacher_prompt=prompt)
    with pytest.raises((ValueError, TypeError), match=error):
        batch_of(run, [{"prompt": text} for text in PROMPTS[:2]])


def test_a_long_prompt_of_a_teacher_is_no_matter_of_the_others(tmp_path: Path) -> None:
    """Positions are those of the model that reads the prompt."""
    far = model(3)
    far.config.max_position_embeddings = 512
    teachers, data = {"a": model(1), "b": far}, prompts(domain=["a", "b"] * 4)
    given = {"b": lambda row: "cat " * 60}
    run = trainer(tmp_path, teacher=teachers, route_column="domain", data=data, teacher_prompt=given)
    batch_of(run, [{"prompt": PROMPTS[0], "domain": route} for route in "ab"])


def test_a_student_that_reads_images_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, teacher_prompt=hint)
    run._is_vlm = True
    with pytest.raises(ValueError, match="teacher_prompt is for texts, and the student reads images"):
        run._set_up_models(Given(teacher=model(1), ref_model=model(2)))
