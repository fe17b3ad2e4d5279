import pytest

from fractalshards.errors import UsageError
from fractalshards.settings import override
from fractaltrain.recipes import BY_KIND, FINETUNING, PRETRAINING
from fractaltrain.recipes.recipe import Recipe, change, scale_lr

HALF = (0.5, 0.5, 0.5)


def test_published_figures():
    """DESIGN.md, Recipes of training, in full: nothing is left to a default that could drift."""
    cycle = {"div_factor": 25, "base_momentum": 0.85, "max_momentum": 0.95}
    finetuning = {
        **cycle, "epochs": 150, "batch_size": 64, "pct_start": 0.1, "final_div_factor": 1e4,
        "augment": "affine", "hflip": 0.5, "mean": HALF, "std": HALF,
    }  # fmt: skip
    assert PRETRAINING["anderson"] == Recipe(
        **cycle, name="anderson", epochs=90, batch_size=64, lr=0.1, weight_decay=1e-4, head_lr_factor=1,
        head_weight_decay=None, pct_start=0, final_div_factor=1e3, augment="none", hflip=0, mean=(0, 0, 0),
        std=(1, 1, 1),
    )  # fmt: skip
    assert FINETUNING["anderson"] == Recipe(
        **finetuning, name="anderson", lr=0.015, weight_decay=5e-5, head_lr_factor=10, head_weight_decay=1e-4
    )
    assert FINETUNING["anderson-scratch"] == Recipe(
        **finetuning, name="anderson-scratch", lr=0.15, weight_decay=1e-4, head_lr_factor=1, head_weight_decay=None
    )


def test_published_figures_of_deit_and_its_kin():
    cosine = {
        "schedule": "cosine", "warmup_lr": 1e-6, "min_lr": 1e-5, "undecayed": "vectors", "crop": "resized",
        "crop_scale": (0.08, 1), "randaugment": 9, "color_jitter": 0.3, "mixup": 0.8, "cutmix": 1,
        "label_smoothing": 0.1,
    }  # fmt: skip
    pretraining = {
        **cosine, "batch_size": 1024, "weight_decay": 0.05, "optimizer": "adamw", "erasing": 0.25, "drop_path": 0.1,
        "mean": HALF, "std": HALF, "head_lr_factor": 1, "augment": "none", "ema": 0,
    }  # fmt: skip
    assert PRETRAINING["deit"] == Recipe(
        **pretraining, name="deit", epochs=90, lr=1e-3, warmup_epochs=5, hflip=0.5, repeats=3
    )
    assert PRETRAINING["nakashima"] == Recipe(
        **pretraining, name="nakashima", epochs=300, lr=6e-4, warmup_epochs=10, hflip=0, repeats=1
    )
    assert FINETUNING["nakashima"] == Recipe(
        **cosine, name="nakashima", epochs=150, batch_size=512, lr=0.01, weight_decay=1e-4, optimizer="sgd",
        momentum=0.9, warmup_epochs=10, hflip=0, erasing=0, drop_path=0, mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    assert PRETRAINING["kataoka"] == Recipe(
        name="kataoka", epochs=90, batch_size=256, lr=0.1, weight_decay=1e-4, undecayed="none", optimizer="sgd",
        momentum=0.9, schedule="step", milestones=(30, 60), gamma=0.1, crop="random", mean=(0.2,) * 3, std=HALF,
    )  # fmt: skip


@pytest.mark.parametrize("recipe", BY_KIND)
def test_what_recipes_do_with_kinds_of_datasets(recipe):
    own = {kind: override(PRETRAINING[recipe], figures) for kind, figures in BY_KIND[recipe].items()}
    assert own["imagenet"].mean == (0.485, 0.456, 0.406)
    assert own["imagenet"].std == (0.229, 0.224, 0.225)
    assert (own["imagenet"].crop, own["imagenet"].hflip) == ("resized", 0.5)
    if recipe == "anderson":
        fractaldb = own["fractaldb"]
        assert (fractaldb.crop, fractaldb.mean, fractaldb.std, fractaldb.hflip) == ("random", (0.2,) * 3, HALF, 0)


def test_change():
    changes = {"epochs": "3", "lr": "1e-2", "mean": "0.2", "std": "0.1,0.2,0.3", "augment": "none"}
    recipe = change(FINETUNING["anderson"], {**changes, "head_weight_decay": "none"})
    assert (recipe.epochs, recipe.lr, recipe.augment, recipe.head_weight_decay) == (3, 0.01, "none", None)
    assert (recipe.mean, recipe.std) == ((0.2, 0.2, 0.2), (0.1, 0.2, 0.3))
    assert recipe.hflip == 0.5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("epoch", "3", "unknown parameter 'epoch', did you mean 'epochs'"),
        ("quux", "3", "there are epochs, batch_size, lr"),
        ("name", "x", "unknown parameter 'name'"),
        ("epochs", "1.5", "epochs=1.5: expected an integer"),
        ("epochs", "0", "epochs is 0, but must be at least 1"),
        ("lr", "fast", "lr=fast: expected a number"),
        ("lr", "-1", "lr is -1.0, but must be above 0"),
        ("lr", "nan", "lr=nan: expected a finite number"),
        ("weight_decay", "inf", "weight_decay=inf: expected a finite"),
        ("head_weight_decay", "few", "head_weight_decay=few: expected a number"),
        ("hflip", "2", "hflip is 2.0, but must be from 0 to 1"),
        ("mean", "1,2", "expected one value, or 3"),
        ("std", "0", "std is .*, but must be above 0"),
        ("crop", "middle", "crop=middle: expected none or random or resized"),
        ("crop_scale", "1,0.5", "crop_scale is .*, but must be two shares, the lower one first, above 0"),
        ("crop_scale", "0,1", "crop_scale is .*, but must be two shares"),
        ("randaugment", "11", "randaugment is 11.0, but must be from 0 to 10"),
        ("label_smoothing", "-0.1", "label_smoothing is -0.1, but must be from 0 to 1"),
        ("mixup", "-1", "mixup is -1.0, but must be at least 0"),
        ("repeats", "0", "repeats is 0, but must be at least 1"),
        ("schedule", "linear", "schedule=linear: expected onecycle or cosine or step"),
        ("ema", "1", "ema is 1.0, but must be at least 0 and below 1"),
        ("milestones", "60,30", "milestones is .*, but must be two epochs, the earlier one first"),
        ("optimizer", "adam", "optimizer=adam: expected sgd or adamw"),
        ("augment", "mixup", "augment=mixup: expected none or affine"),
    ],
)
def test_change_with_nonsense(name, text, message):
    with pytest.raises(UsageError, match=message):
        change(FINETUNING["anderson"], {name: text})


def test_warmup_longer_than_training_is_refused():
    with pytest.raises(UsageError, match="warmup_epochs is 5, but must be below the number of epochs, 4"):
        change(PRETRAINING["deit"], {"epochs": "4"})


def test_scaling_the_learning_rate():
    recipe = change(PRETRAINING["anderson"], {"batch_size": "512"})
    assert recipe.lr == 0.1
    assert scale_lr(recipe, published_batch_size=64).lr == pytest.approx(0.8)
