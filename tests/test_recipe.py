"""Recipes: what is read, what is refused, and in which words."""

import subprocess
import sys
from pathlib import Path

import pytest

from uptrain.errors import RecipeError
from uptrain.training.recipe import Recipe, copy_recipe, load_recipe, shipped_recipes

TEXT = """
source: models/books
convert: {num_key_value_heads: 2}
data: {train: [a.jsonl, /data/b.txt]}
train: {steps: 20, batch_tokens: 32_768, learning_rate: 1e-3}
output: out
"""
ROOT = Path(__file__).parents[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(TEXT)
    (tmp_path / "models" / "books").mkdir(parents=True)
    return file


def paths_of(recipe: Recipe) -> list[str]:
    return [source.path for source in recipe.data.train]


def test_paths_are_relative_to_the_recipe_and_overrides_to_here(path, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    recipe = load_recipe("../recipe.yaml", ["data.validation=v.jsonl", "evaluate.data=e.jsonl"])
    folder = tmp_path / "here" / ".."
    assert [Path(p).resolve() for p in (recipe.source, recipe.output, *paths_of(recipe))] == [
        (folder / "models/books").resolve(),
        (folder / "out").resolve(),
        (folder / "a.jsonl").resolve(),
        Path("/data/b.txt"),
    ]
    assert recipe.data.validation == str(here / "v.jsonl")
    assert recipe.evaluate.data == str(here / "e.jsonl")


def test_a_hub_id_stays_unless_there_is_such_a_folder(path, tmp_path):
    assert load_recipe(path, ["source=owner/name"]).source == "owner/name"
    path.write_text(TEXT.replace("models/books", "owner/books"))
    assert load_recipe(path).source == "owner/books"
    (tmp_path / "owner" / "books").mkdir(parents=True)
    assert load_recipe(path).source == str(tmp_path / "owner" / "books")


def test_a_teacher_is_a_folder_a_hub_id_or_none(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = {
        given: load_recipe(path, [f"train.teacher={given}"]).train.teacher
        for given in ("models/books", "owner/name", "none", "null")
    }
    assert teacher == {
        "models/books": str(tmp_path / "models" / "books"),
        "owner/name": "owner/name",
        "none": None,
        "null": None,
    }
    (tmp_path / "none").mkdir()
    assert load_recipe(path, ["train.teacher=none"]).train.teacher is None
    assert load_recipe(path, ["train.teacher=./none"]).train.teacher == str(tmp_path / "none")


def test_sources_have_keys_of_their_own(path, tmp_path):
    path.write_text(
        TEXT.replace(
            "[a.jsonl, /data/b.txt]",
            "[{path: a.parquet, column: body, weight: 3}, {dataset: owner/texts, config: en, "
            "split: test, weight: 0.5}, {dataset: saved/texts, weight: 1e-2}], tokens: shared/tokens",
        )
    )
    (tmp_path / "saved" / "texts").mkdir(parents=True)
    data = load_recipe(path).data
    first, second, third = data.train
    assert (first.path, first.column) == (str(tmp_path / "a.parquet"), "body")
    assert (second.dataset, second.config, second.split) == ("owner/texts", "en", "test")
    assert third.dataset == str(tmp_path / "saved" / "texts")
    assert data.tokens == str(tmp_path / "shared" / "tokens")
    assert data.weights == (3, 0.5, 0.01)
    assert not data.attention_within_documents
    assert load_recipe(path, ["data.train=[a.txt, a.txt]"]).data.weights is None


def test_examples_are_found_from_anywhere(path):
    recipe = load_recipe(path, ["source=examples:books-1m"])
    assert Path(recipe.source, "config.json").is_file()


def test_defaults_are_those_of_the_methods(path):
    train = load_recipe(path).train
    assert (train.betas, train.weight_decay, train.gradient_clipping) == ([0.9, 0.95], 0.1, 1.0)
    assert (train.schedule, train.warmup, train.dropout) == ("cosine", 0.05, 0.0)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ("alpha: 0.05, pretraining_tokens: 131_072_000", 200),
        ("alpha: 5e-3, pretraining_tokens: 131.072e+6", 20),
        ("tokens: 100_000", 3),
        ("steps: 7", 7),
    ],
)
def test_a_budget_is_given_one_way(path, budget, steps):
    path.write_text(TEXT.replace("steps: 20", budget))
    assert load_recipe(path).train.total_steps == steps


def test_overrides_are_yaml_values_at_dotted_keys(path):
    recipe = load_recipe(
        path,
        ["train.steps=null", "train.tokens=1e6", "train.compile=true", "data.train=[c.txt]",
         "convert=null", "train.learning_rate=1e-5", "evaluate={data: x.txt}"],
    )  # fmt: skip
    assert recipe.train.tokens == 1_000_000
    assert recipe.train.learning_rate == 1e-5
    assert recipe.train.compile
    assert recipe.convert is None
    assert [Path(p).name for p in paths_of(recipe)] == ["c.txt"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "unknown key train.learning_rat; did you mean train.learning"),
        ("learning_rate=1", "unknown key learning_rate; did you mean train.learning_rate?"),
        ("data.batch_token=1", "unknown key data.batch_token; did you mean train.batch_tokens?"),
        ("sorce=x", "unknown key sorce; did you mean source?"),
        ("data.xyzzy=1", "the keys of data are train, validation, repeat, seed"),
        ("train.learning_rate=.nan", "train.learning_rate is nan; expected a finite number"),
        ("train.learning_rate=-1", "train.learning_rate is -1; expected greater than 0"),
        ("train.learning_rate=null", "train.learning_rate is None; expected a valid number"),
        ("train.learning_rate=fast", "train.learning_rate is 'fast'; expected a valid number"),
        ("train.batch_tokens=2.5", "train.batch_tokens is 2.5; expected a valid integer"),
        ("train.compile=1", "train.compile is 1; expected a valid boolean"),
        ("data.train=a.jsonl", "expected a valid list"),
        ("data.train=[3]", "data.train.0 is 3; expected a section with keys of its own"),
        ("data.train=[{}]", "a source has neither path nor dataset; give it one of the two"),
        ("data.train=[{path: a, dataset: b/c}]", "a source has both path and dataset; give it"),
        ("data.train=[{path: a, colum: b}]", "unknown key data.train.0.colum; did you mean data.tr"),
        ("data.train=[{path: a, weight: 0}]", "data.train.0.weight is 0; expected greater than 0"),
        ("data.train=[{path: a, weight: 1}, b]", "data.train: 1 of 2 sources have a weight; give"),
        ("train.steps=[1]", "train.steps is a list; expected a valid integer"),
        ("train=3", "train is 3; expected a section with keys of its own"),
        ("train.betas=[0.9]", "train.betas: 1 given; expected at least 2"),
        ("train.betas=[0.9, 0.9, 0.9]", "train.betas: 3 given; expected at most 2"),
        ("data.train=[]", "data.train: 0 given; expected at least 1"),
        ("train.steps=0", "train.steps is 0; expected greater than or equal to 1"),
        ("train.warmup=1.5", "train.warmup is 1.5; expected less than or equal to 1"),
        ("train.schedule=linear", "train.schedule is 'linear'; expected 'cosine', 'wsd' or"),
        ("train.tokens=1e6", "train.steps and train.tokens given, expected exactly one way"),
        ("train.steps=null", "no budget, expected exactly one way to say how long to train; give"),
        ("train.alpha=0.05", "train.alpha and train.steps given, expected exactly one way"),
        ("train.steps", "train.steps: expected key=value, such as train.learning_rate=1e-3"),
        ("source.x=1", "source has no keys of its own"),
        ("train.teacher=3", "train.teacher is 3; expected a valid string"),
        ("train.teachr=none", "unknown key train.teachr; did you mean train.teacher?"),
        ("train.distillation_weight=1.5", "distillation_weight is 1.5; expected less than or equal"),
        ("train.keep_best=maybe", "train.keep_best is 'maybe'; expected a valid boolean"),
        ("train.trainable=mlp", "train.trainable is 'mlp'; expected 'all', 'attention' or 'attent"),
        ("train.attention_fraction=0", "train.attention_fraction is 0; expected greater than 0"),
        ("train.optimizer=sgd", "train.optimizer is 'sgd'; expected 'adamw', 'adafactor', 'muon' or"),
        ("evaluate={data: a, decode: often}", "evaluate.decode is 'often'; expected a valid boolean"),
        ("source=!!python/name:os.system x", "is no plain YAML (line 1: tags are refused)"),
        ("source={a: &a x, b: *a}", "is no plain YAML (line 1: aliases are refused)"),
        ("source={a: 1, a: 2}", "is no plain YAML (the block at line 1 has the key a twice)"),
        ("source=" + "[" * 9000, "is no plain YAML ("),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(path, override, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert len(text) < 700


def test_an_empty_value_of_what_is_not_available_asks_for_nothing(path):
    load_recipe(path, ["evaluate={data: x.txt, decode: false}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no keys; expected source, data, train and output"),
        ("a: [", "is no plain YAML (line 1: expected the node content"),
        (TEXT.replace("output: out", ""), "output is missing; add it"),
        (TEXT.replace(", learning_rate: 1e-3", ""), "train.learning_rate is missing; add it"),
        (
            TEXT.replace("steps: 20", "tokens: 5"),
            "the budget is less than one step of train.batch_",
        ),
    ],
)
def test_a_wrong_file_is_refused(path, text, message):
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_an_unreadable_recipe_is_refused(path, tmp_path):
    with pytest.raises(RecipeError, match=r"is a folder, and the shipped recipes are .*quickstart"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"no such file, .*\(did you mean quickstart\?\)"):
        load_recipe("quickstar")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read as UTF-8 text"):
        load_recipe(path)
    path.write_bytes(b"#" * 2**21)
    with pytest.raises(RecipeError, match="is too large for a recipe"):
        load_recipe(path)


def test_every_shipped_recipe_loads_and_says_how_to_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [entry["name"] for entry in shipped_recipes()]
    assert names == [
        "books-14m-gqa4-paper", "books-14m-gqa4", "books-14m-mqa", "llama2-7b-gqa8", "llama2-7b-mqa",
        "quickstart",
    ]  # fmt: skip
    for entry in shipped_recipes():
        assert len(entry["description"]) > 20
        recipe = load_recipe(entry["name"])
        assert Path(recipe.output).parent == tmp_path
        assert recipe.convert is not None
        comment = (ROOT / "recipes" / f"{entry['name']}.yaml").read_text().partition("\n\n")[0]
        assert f"uptrain run {entry['name']}" in comment
        assert "Hardware" in comment


def test_the_quickstart_is_alpha_of_the_pretraining():
    train = load_recipe("quickstart").train
    assert (train.total_steps, train.batch_tokens) == (80, 8192)
    for name, steps in (("books-14m-gqa4", 200), ("llama2-7b-gqa8", 1000)):
        assert load_recipe(name).train.total_steps == pytest.approx(steps, rel=0.2)


def test_a_copied_recipe_is_the_same_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = copy_recipe("quickstart", "mine.yaml")
    assert load_recipe(written) == load_recipe("quickstart")
    with pytest.raises(RecipeError, match=r"mine.yaml: exists already; choose another name"):
        copy_recipe("quickstart", "mine.yaml")
    assert copy_recipe("quickstart") == Path("quickstart.yaml")
    with pytest.raises(
        RecipeError, match=r"quikstart: no such recipe; .*did you mean quickstart\?"
    ):
        copy_recipe("quikstart")
    with pytest.raises(RecipeError, match=r"cannot be written \(No such file or directory\)"):
        copy_recipe("quickstart", "nowhere/mine.yaml")


def test_recipes_need_no_torch():
    code = "import sys, uptrain.training.recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
