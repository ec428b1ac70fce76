"""Settings under which a whole step trains in seconds: eight pictures of 64 px, random weights, thin heads.

The method is the published one, every module on.
"""

from cl4wsis.tasks import Plan, load_plan

TINY = [
    'steps=[["disc", "square", "triangle", "star"], ["ring", "cross"], ["crescent", "heart"]]',
    "data.num_train=8",
    "data.num_val=4",
    "data.image_size=64",
    "recipe.crop_size=64",
    "recipe.input_size=[64, 64]",
    "recipe.network.weights=none",
    "recipe.network.semantic_channels=16",
    "recipe.network.instance_channels=16",
    "recipe.network.decoder_channels=16",
    "recipe.network.localizer_channels=16",
    "recipe.base.epochs=2",
    "recipe.base.batch_size=4",
    "recipe.semantic.epochs=2",
    "recipe.semantic.batch_size=4",
    "recipe.semantic.optimizer.warmup_epochs=1",
    "recipe.instance.epochs=2",
    "recipe.instance.batch_size=4",
    "recipe.log_every=1",
    "recipe.network.encoder_statistics=batch",
    "recipe.network.head_init=default",
    "recipe.semantic.train_encoder=true",
    "recipe.semantic.random_dropout=true",
    "recipe.semantic.refine_target=false",
    "recipe.semantic.old_classes_compete=false",
    "recipe.semantic.suppress_old=0",
    "recipe.semantic.peak_input=logits",
    "recipe.instance.peaks.smoothing=true",
    "recipe.instance.peaks.accept_peakless=false",
]


def tiny_plan(*overrides: str) -> Plan:
    """Load the plan ``shapes`` with these settings and further assignments."""
    return load_plan("shapes", [*TINY, *overrides])
