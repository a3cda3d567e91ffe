"""The demo's data: what student and teacher are told, 32 training questions, 16 held-out ones, and how long it trains.

All are open questions: a 135M model fails at requests for lists, capitals or one-word answers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PLAIN_SYSTEM = "You are a helpful AI assistant."
# The teacher is the same model told this, so log q - log r rewards each token for sounding excited. With the examples
# most of its answers have a "!", with a system prompt alone less than half.
TEACHER_SYSTEM = "You are very excited! Every sentence ends with an exclamation mark!"
# The answers of the examples are long, so that it is not short answers that are learned.
TEACHER_EXAMPLES = (
    "What is a tree?",
    "A tree is a tall plant! It has a strong trunk and many green leaves! It needs sun and water to grow! Birds build "
    "their nests in it! I just love trees!",
    "How do I cook?",
    "It is so much fun! First you choose a good recipe! Then you cut the vegetables! You heat the pan and stir! At the "
    "end you eat with your friends!",
)
EXTRAPOLATION = 2.0  # the lambda beyond 1 that the student is trained with; the comparison needs all three models

TRAIN_QUESTIONS = (
    "What is the best way to cook rice?",
    "How do I learn to swim?",
    "Why is the sky blue?",
    "Tell me about your day.",
    "What should I eat for breakfast?",
    "How can I sleep better at night?",
    "Tell me a short story about a dog.",
    "What is your favorite season?",
    "How do I make new friends?",
    "What makes a good leader?",
    "Tell me about the moon.",
    "How does a bicycle work?",
    "What should I do on a rainy day?",
    "Can you recommend a good book?",
    "How do I take care of a cat?",
    "What is the meaning of friendship?",
    "Tell me about your family.",
    "How do birds fly?",
    "What do you think about music?",
    "How do I grow tomatoes?",
    "Why do people like to travel?",
    "Tell me about a famous inventor.",
    "How can I save money?",
    "What is a good gift for my mother?",
    "Why do we dream?",
    "How do I start running?",
    "What is it like to live in a big city?",
    "Tell me something interesting about fish.",
    "How do I bake bread?",
    "What would you do with a million dollars?",
    "Why is exercise important?",
    "How do I write a letter to a friend?",
)

HELD_OUT_QUESTIONS = (
    "How do I make a good cup of coffee?",
    "Tell me about the stars.",
    "What should I wear to a wedding?",
    "How do I learn to play the guitar?",
    "Why do cats purr?",
    "What is your favorite food?",
    "Tell me a story about a lost key.",
    "How can I be more confident?",
    "What is the best way to spend a weekend?",
    "How do airplanes stay in the air?",
    "Tell me about a place you would like to visit.",
    "Why do leaves change color?",
    "How do I clean my kitchen?",
    "What makes you happy?",
    "How should I prepare for an interview?",
    "What do you know about elephants?",
)


def messages(question: str) -> list[dict[str, str]]:
    """What the student and the reference are asked. Without a system prompt the template adds one of its own."""
    return [{"role": "system", "content": PLAIN_SYSTEM}, {"role": "user", "content": question}]


def hinted(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the teacher is asked in place of ``row["prompt"]``: the ``teacher_prompt`` of the trainer."""
    texts = (TEACHER_SYSTEM, *TEACHER_EXAMPLES, row["prompt"][-1]["content"])
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


@dataclass(frozen=True)
class Schedule:
    """How long to train. A rollout is ``prompts_per_rollout`` answers of ``new_tokens`` tokens by the current student.

    With several updates per rollout, all but the first learn from prefixes that an older student wrote.
    """

    rollouts: int
    prompts_per_rollout: int = 8
    new_tokens: int = 32
    updates_per_rollout: int = 4
    learning_rate: float = 3e-3
    trained_layers: int = 10  # at the top: gradients end below them
    rank: int = 8  # of the adapter
    eval_answers: int = 2  # per held-out question
    eval_tokens: int = 32

    @property
    def updates(self) -> int:
        return self.rollouts * self.updates_per_rollout

    def order(self, count: int, seed: int) -> list[int]:
        """Which of ``count`` questions is asked, one for each answer: each once before any comes again."""
        order = random.Random(seed).sample(range(count), count)
        return [order[i % count] for i in range(self.rollouts * self.prompts_per_rollout)]
