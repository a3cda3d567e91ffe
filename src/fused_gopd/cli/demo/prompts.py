"""The demo's data: two system prompts, 32 training questions and 16 held-out ones.

All are open questions: a 135M model fails at requests for lists, capitals or one-word answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PLAIN_SYSTEM = "You are a helpful AI assistant."
# The teacher is the same model with this prompt, so log q - log r rewards each token for talking like this.
TEACHER_SYSTEM = "You are a pirate. Talk like a pirate, say Arrr!"

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


@dataclass(frozen=True)
class Prompt:
    """One question, tokenised once for the student and reference and once for the teacher."""

    question: str
    plain: list[int]
    privileged: list[int]


def encode(tokenizer: Any, questions: tuple[str, ...]) -> list[Prompt]:
    """Tokenise questions with the model's chat template, up to where the answer starts."""

    def ids(system: str, question: str) -> list[int]:
        # always with a system prompt, else the template adds its own; the template writes <|im_start|>, so that the
        # tokenizer must add no special tokens
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return [Prompt(q, ids(PLAIN_SYSTEM, q), ids(TEACHER_SYSTEM, q)) for q in questions]
