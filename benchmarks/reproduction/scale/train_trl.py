"""One of the settings in ``trl/`` with :class:`fused_gopd.integrations.trl.GOPDTrainer`.

    accelerate launch --config_file trl/accelerate.yaml train_trl.py --config trl/same-size.yaml

Options on the command line take precedence over those of the file. ``docs/paper-settings.md`` says what has been run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import TrlParser

from fused_gopd.integrations.trl import GOPDConfig, GOPDTrainer


@dataclass
class Setting:
    """The models and prompts of a run; everything else is :class:`GOPDConfig`'s."""

    model: str = field(metadata={"help": "The student: a path or hub name."})
    teacher: list[str] = field(metadata={"help": "Likewise; several as ROUTE=MODEL, by route_column."})
    prompts: str = field(metadata={"help": "A parquet file; its column prompt has texts or lists of messages."})
    ref_model: str | None = field(default=None, metadata={"help": "The reference; not needed where lambda is 1."})
    max_prompt_length: int = field(default=2048, metadata={"help": "Longer prompts are left out."})

    @property
    def teachers(self) -> str | dict[str, str]:
        """One teacher, or teachers by route."""
        routes = dict(entry.split("=", 1) for entry in self.teacher if "=" in entry)
        if len(routes) == len(self.teacher):
            return routes
        if len(self.teacher) == 1:
            return self.teacher[0]
        raise ValueError(f"several teachers need a route each, ROUTE=MODEL, got {', '.join(self.teacher)}")


def parse(arguments: list[str] | None = None) -> tuple[Setting, GOPDConfig]:
    setting, args = TrlParser((Setting, GOPDConfig)).parse_args_and_config(arguments)
    return setting, args


def prompts_of(setting: Setting, args: GOPDConfig, tokenizer: Any) -> Dataset:
    """The prompts that are short enough, with their routes; columns that nothing needs (test cases) are not read."""
    columns = ["prompt", *([args.route_column] if args.route_column else [])]
    data = load_dataset("parquet", data_files=setting.prompts, columns=columns, split="train")

    def short_enough(prompt: Any) -> bool:
        chat: dict[str, Any] = {"add_generation_prompt": True, **(args.chat_template_kwargs or {})}
        text = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, tokenize=False, **chat)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= setting.max_prompt_length

    return data.filter(short_enough, input_columns="prompt")


def trainer_of(setting: Setting, args: GOPDConfig) -> GOPDTrainer:
    tokenizer = AutoTokenizer.from_pretrained(setting.model, padding_side="left")
    return GOPDTrainer(
        setting.model,
        setting.teachers,
        args,
        prompts_of(setting, args, tokenizer),
        processing_class=tokenizer,
        # where lambda is 1 all the time it would be loaded for nothing
        ref_model=setting.ref_model if args.reward_scale != 1 or args.reward_scale_end not in (None, 1) else None,
    )


def main(arguments: list[str] | None = None) -> None:
    trainer = trainer_of(*parse(arguments))
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
