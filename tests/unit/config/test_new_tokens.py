"""Which tokens are new and special, and that none of them is left untrained."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import load, to_yaml
from trainer.config.new_tokens import new_tokens
from trainer.errors import ConfigError

TYPED = 'model.new_tokens=[quokka,"<|tool|>",{text:"<tool>",special:true},{text:"<|x|>",special:false}]'


def test_the_form_says_which_are_special_unless_the_item_does(tmp_path: Path) -> None:
    config = load([TYPED, "method.trainable_tokens=new"])
    assert new_tokens(config.model) == {"quokka": False, "<|tool|>": True, "<tool>": True, "<|x|>": False}
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load([], tmp_path / "config.yaml") == config, "nothing of it is taken for a secret"
    assert new_tokens(load().model) == {}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["model.new_tokens=quokka"], "must be a list of one or more tokens → 'model.new_tokens=[quokka]'"),
        (["model.new_tokens=[]"], "must be a list of one or more tokens"),
        (["model.new_tokens=[1]"], "model.new_tokens=1: is no token"),
        (["model.new_tokens=[{text:a}]"], "is no token"),
        (["model.new_tokens=[a,{text:a,special:true}]"], "is there twice"),
        (["model.new_tokens=[quokka]"], "they start as → method.trainable_tokens=new, or 'method.modules_to_save="),
        (["model.new_tokens=[quokka]", "method=ia3"], "cannot be trained by IA3"),
        (["model.new_tokens=[a,b]", "method.trainable_tokens=[a,c]"], "leaves out b, which model.new_tokens adds"),
        (["method.trainable_tokens=new"], "means those of model.new_tokens, and there are none"),
        (["method.trainable_tokens=quokka"], "must be new, or a list of one or more tokens"),
        (["method.trainable_tokens=[a,a]"], "each once"),
        (["method.modules_to_save=[]"], "must be a list of one or more module names"),
        (["method=dora", "method.modules_to_save=[a,a]"], "each once"),
        (["method=prompt", "method.trainable_tokens=[a]"], "has no meaning for prompt tuning"),
    ],
)
def test_what_is_refused(typed: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(typed)
    assert said in str(error.value)


def test_all_weights_train_new_ones_too() -> None:
    assert new_tokens(load(["method=full", "rank=null", "model.new_tokens=[quokka]"]).model) == {"quokka": False}
