"""Settings of every stage as frozen dataclasses: plain data, no behaviour, importable without torch.

The command line makes its flags from these, a run keeps them in ``config.yaml``, and the docstring under a field is
its help text. Units stand in the names; a timestep is an integer in 0..T-1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

LossName = Literal["mse", "l1"]
OutputName = Literal["loss", "squares", "mean", "l1", "l2", "max"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
TargetName = Literal[PredictionType, "flow", "edm"]
WeightingScheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]
WeightsName = Literal["raw", "ema"]
ConditionName = Literal["none", "label", "words"]
DtypeName = Literal["float32", "float64"]
ProjectionKind = Literal["two_sided_sketch", "two_sided", "sketch", "gaussian", "rademacher", "identity"]
RowsDtype = Literal["float16", "bfloat16", "float32"]
AutocastName = Literal["no", "bf16", "fp16"]
MemberScale = Literal["none", "unit_mean_square"]
MemberImages = Literal["same", "held"]
SettingsT = TypeVar("SettingsT", "TraceSettings", "IndexSettings", "QuerySettings")


@dataclass(frozen=True)
class DataSettings:
    """How images are read from a source and brought to one size."""

    resolution: int | None = None
    """Height and width in pixels to resize to. Without it all images must already have one size."""
    center_crop: bool = False
    """Keep the aspect ratio and cut the middle square, instead of squeezing the whole image into the square."""
    grey: bool = False
    """Read images as one channel instead of three."""
    image_column: str | None = None
    """Column that holds the images; found by type or by the names image, img, pixel_values when not given."""
    id_column: str | None = None
    """Column that holds the stable sample ids; found by the names id, sample_id, image_id when not given."""
    label_column: str | None = None
    """Column that holds a label; found by the names label, class when not given."""
    caption_column: str | None = None
    """Column that holds a caption; found by the names text, caption, prompt when not given."""
    max_megapixels: float = 100.0
    """An image with more pixels than this is refused, before it is decoded."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """What a training script of ``diffusers`` adds to noise and loss; named as its flags."""

    snr_gamma: float | None = None
    """Min-SNR weighting of the loss with this gamma (Hang et al. 2023), of DDPM-like models."""
    noise_offset: float = 0.0
    """Standard deviation of a shift of the noise, one for each channel, that the target has too."""
    input_perturbation: float = 0.0
    """Standard deviation of further noise, in the noisy image alone."""
    weighting_scheme: WeightingScheme = "none"
    """Of flow matching, as for SD3: logit_normal and mode draw timesteps, sigma_sqrt and cosmap weigh the loss."""
    logit_mean: float = 0.0
    """Mean of logit_normal."""
    logit_std: float = 1.0
    """Standard deviation of logit_normal."""
    mode_scale: float = 1.29
    """Scale of mode."""
    precondition_outputs: bool = False
    """The loss compares clean images, so it is that of the velocity times sigma squared (the SD3 scripts' default)."""


@dataclass(frozen=True)
class ConditioningSettings:
    """Where latents, captions or classes of a network come from. A network of pixels alone needs none of it."""

    base: str | None = None
    """Folder of the saved pipeline whose VAE and text encoders were used in training; of a LoRA, also of the model that
    it adapts. Default: the model's own folder where that is a pipeline, else the folder that the record names."""
    caption: str | None = None
    """Caption of images that come without one, as the instance prompt of DreamBooth. Default: the record's."""
    guidance_scale: float | None = None
    """What a guidance-distilled network, such as FLUX.1 dev, was told in training. Default: the record's."""
    max_sequence_length: int | None = None
    """Tokens of a caption, of pipelines that leave the choice. Default: the record's, else the pipeline's own."""
    lora_alpha: float | None = None
    """Alpha of a LoRA whose files do not say it. Default: its rank, as diffusers has it."""
    class_names: tuple[str, ...] = ()
    """Labels in the order of the network's classes. Default: in the order of their numbers, or of the alphabet."""


def changed_settings(settings: DataSettings | ConditioningSettings | ObjectiveSettings) -> dict[str, Any]:
    """Give the settings that are not at their defaults, by name."""
    plain = type(settings)()
    return {name: value for name, value in vars(settings).items() if value != getattr(plain, name)}


@dataclass(frozen=True)
class ModelSettings:
    """A ``diffusers`` U-Net in pixels and its noise schedule, when ``whence train`` makes the model."""

    widths: tuple[int, ...] = (32, 64, 64)
    """Channels of each resolution level, from full size down."""
    layers_per_block: int = 1
    """Residual blocks at each level."""
    attention_levels: int = 1
    """How many of the lowest levels have self-attention."""
    norm_groups: int = 8
    """Groups of each group normalisation."""
    dropout: float = 0.0
    """Dropout rate in the residual blocks. With dropout the replay check is not possible."""
    train_timesteps: int = 1000
    """Timesteps T of the noise schedule."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """Noise schedule, by its name in diffusers."""
    prediction_type: PredictionType = "epsilon"
    """What the model predicts: the noise, the velocity v, or the clean image."""
    condition: ConditionName = "none"
    """What the model is told of an image: nothing, its label (UNet2DModel), or the words of its caption
    (UNet2DConditionModel with cross-attention, where ``attention_levels`` say)."""
    word_width: int = 64
    """Length of a word's vector, of a model that is told words."""
    caption_words: int = 16
    """Words in the longest caption, of a model that is told words."""
    classes: tuple[str, ...] = ()
    """Labels in the order of their numbers, of a model that is told labels. Default: those of the images, sorted."""


@dataclass(frozen=True)
class TrainingSettings:
    """One training run. The learning rate goes up over the warm-up steps, then follows ``schedule``."""

    epochs: int = 100
    """Passes over the training set; every image is visited exactly once in each."""
    batch_size: int = 32
    """Images in one optimizer step. The last batch of an epoch may be smaller; nothing is dropped."""
    micro_batch_size: int | None = None
    """Images in one forward and backward pass; gradients add up over an optimizer step. Default: the whole batch."""
    checkpoints: int = 4
    """Checkpoints to keep, evenly spaced over training, the last one at its end."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 50
    """Optimizer steps over which the learning rate goes up from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning rate after the warm-up."""
    adam_beta1: float = 0.9
    """AdamW decay rate of the first moment."""
    adam_beta2: float = 0.999
    """AdamW decay rate of the second moment."""
    weight_decay: float = 1e-6
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm. The clip coefficient is part of the record."""
    loss: LossName = "mse"
    """Training loss: mean squared or mean absolute error over the elements of a sample."""
    random_flip: bool = False
    """Mirror half of the visits left to right. Each flip is part of the record."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay, beside the raw ones."""
    mixed_precision: AutocastName = "no"
    """Autocast type of the forward pass. fp16 needs a GPU."""
    caption_dropout: float = 0.1
    """Share of visits whose caption or label is withheld, so that the model can be guided; each is on record."""
    seed: int = 0
    """Seed of the initial weights, the order of the images, noise, timesteps and flips."""


@dataclass(frozen=True)
class ComputeSettings:
    """How much is done at once, and where: it changes results by rounding only."""

    batch_size: int = 64
    """Events in one forward and backward pass; at most, where memory is given."""
    device: str = "cpu"
    """Torch device, for example cpu or cuda:0."""


@dataclass(frozen=True)
class QuerySettings(ComputeSettings):
    """How the gradients of queries are taken. What is not given is as the method declares it."""

    timesteps: int | None = None
    """Timesteps of the query grid, evenly spaced on 1..T-1. By default 100 for tracin and retrac."""
    draws: int | None = None
    """Noise draws at each timestep of the query grid, or step of a sampler: an even number, or 1 (then no reliability
    can be given). By default 16 for tracin and retrac."""
    antithetic: bool = False
    """Take the draws of the query grid in pairs of opposite noise, which come nearer to converged scores in as many
    passes; draws must be a multiple of 4, or 2 (then no reliability can be given)."""
    phases: int | None = None
    """Bins of query timesteps for which scores are kept apart, from least noise to most. By default 4."""
    damping: float | Literal["gcv"] | None = None
    """Damping of methods that have one, in multiples of the mean eigenvalue; by default 10 for trak and its kin of the
    loss (journey-trak, relatif, renormalised), 0.1 for all others. gcv: that of trak, journey-trak, d-trak, das and
    relatif is chosen by generalised cross-validation over training images."""


@dataclass(frozen=True)
class GradientSettings(ComputeSettings):
    """Which gradients stand for training images, and in which arithmetic all gradients are taken."""

    replay: Literal["last", "all"] | None = None
    """Which visits of a training image stand for it at a checkpoint: the last one, or every one since the previous. By
    default the last."""
    train_timesteps: int | None = None
    """Timesteps of the grid on the training side, where a method or a missing record asks for one. By default 10."""
    train_draws: int | None = None
    """Noise draws at each timestep of that grid. By default 1."""
    parameters: tuple[str, ...] = ("*",)
    """Parameters whose gradients count, by shell-style patterns over their names."""
    weights_name: WeightsName = "raw"
    """Which weights of a checkpoint: the trained ones, or their moving average."""
    uncovered: Literal["exact", "refuse"] = "exact"
    """Parameters outside the layers that are known: taken by running the model again for each sample, or refused."""
    block_size: int = 256
    """Training images in one unit of work: what a killed run loses at most."""
    dtype: DtypeName = "float32"
    """Arithmetic of the forward pass, gradients and dot products."""
    autocast: AutocastName = "no"
    """Coarser type of the forward pass, whatever training used; gradients, norms and dot products stay in dtype. Faster
    on a GPU; scores are off by that type's rounding."""
    tf32: bool = False
    """Let CUDA multiply float32 as TensorFloat32: faster, and off by about one in a thousand."""
    seed: int = 0
    """Seed of the noise of queries and grids."""
    memory: str | None = None
    """Bound on the memory for weights, activations and held gradients, such as 8GiB; Python and torch themselves come
    on top. Sets the batch size and, of a trace, how many queries are held at once: each further turn of queries is a
    pass over the training set. By default 4GiB for query gradients, and as much as the batch size needs for the
    rest."""


@dataclass(frozen=True)
class TraceSettings(QuerySettings, GradientSettings):
    """How queries are compared with training images. What is not given is as the method declares it."""

    vae: str | None = None
    """For vae and vae-dot: folder of an AutoencoderKL or of a pipeline that has one; or hub:NAME, to download it."""
    clip: str | None = None
    """For clip and clip-dot: folder of a CLIP model that transformers saved, with its preprocessor; or hub:NAME."""
    encoder: str | None = None
    """For embeddings and embeddings-dot: folder of a transformers model with its preprocessor; hub:NAME; or
    module:function or FILE.py:function, which maps images (float32, in [-1, 1], image x channel x height x width) to
    one row of features each."""


@dataclass(frozen=True)
class IndexSettings(GradientSettings):
    """What a store of projected training gradients holds."""

    grid: bool = False
    """Take training images on a grid even where their training is on record, as grad-dot and grad-cos need it."""
    output: OutputName = "loss"
    """Output function whose gradients are kept: the training loss; or, of the network's prediction alone, its mean
    square, mean, mean absolute value, length, or largest absolute value. d-trak needs squares, das needs mean."""
    checkpoints: Literal["all", "last"] = "all"
    """At which checkpoints. grad-dot and grad-cos need the last one only."""
    keep: Literal["units", "sum"] = "units"
    """Rows of an image: one for each of its events (a visit; a timestep of a grid), or one for their sum, plain and of
    unit-length gradients. Sums take less room, and cannot be weighted otherwise later."""
    projection: ProjectionKind = "two_sided_sketch"
    """How gradients are projected."""
    width: int = 4096
    """Numbers in a row. Kinds identity and two_sided have the width that follows from the parameters."""
    side: int = 32
    """Two-sided kinds shrink a side of a layer's gradient to this."""
    projection_seed: int = 0
    """Seed of the projection."""
    rows: RowsDtype = "float16"
    """Type of the rows on disk."""
    norms: Literal["exact", "projected"] = "exact"
    """Lengths of gradients: exact, or those of the projected gradients, which take less time and are less exact."""


@dataclass(frozen=True)
class PlanSettings(TraceSettings, IndexSettings):
    """Settings of a trace, or of an index and queries to it."""

    def part(self, kind: type[SettingsT]) -> SettingsT:
        """Give those of one command."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})


@dataclass(frozen=True)
class TrainAgainSettings:
    """How models are trained again from scratch, and how what they give for queries is measured."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training; every model is trained with each. With two or more the noise of the outputs is known."""
    epochs: int | None = None
    """Passes over the images of a model. By default as many as the run's training took over all images."""
    same_steps: bool = False
    """Take about as many optimizer steps as the run did, in whole epochs, instead of as many epochs."""
    checkpoints: int = 1
    """Checkpoints during one training. A killed one goes on from its last."""
    trainer: str | None = None
    """Your own training, instead of the run's: module:function, called with (ids, seed, folder); or a shell command
    with {ids} (a JSON file with the list of ids), {seed} and {folder}. It leaves a diffusers model in the folder."""
    timesteps: int = 50
    """Timesteps at which a query is measured, one in each of as many equal parts of 0..T-1."""
    draws: int = 2
    """Noise draws at each timestep, in pairs of opposite sign."""
    measure_seed: int = 0
    """Seed of the timesteps and the noise of measuring."""
    weights_name: WeightsName = "raw"
    """Which weights are measured: the trained ones, or their moving average."""
    batch_size: int = 64
    """Events in one forward pass of measuring."""
    devices: tuple[str, ...] = ("cpu",)
    """Torch devices, for example cuda:0 cuda:1; the workers take them in turn."""
    workers: int = 1
    """Processes that train at once. More may be started elsewhere with the same command; all share the work."""
    threads: int = 1
    """CPU threads of each of them."""
    keep_models: bool = False
    """Keep the models, to measure other queries later. They are removed once they are measured otherwise."""


@dataclass(frozen=True)
class RetrainingSettings(TrainAgainSettings):
    """Models trained again on subsets of the training set, and how their outputs are measured."""

    subsets: int = 64
    """Random subsets of the training set; with more of them later, what is trained already is used."""
    fraction: float = 0.5
    """Share of the training images in each subset."""
    stratified: bool = False
    """Draw this share of the images of each label, instead of all images together."""
    subset_seed: int = 0
    """Seed of the draws of subsets."""


Way = Literal["without", "only"]


@dataclass(frozen=True)
class CounterfactualSettings(TrainAgainSettings):
    """Models trained again without the images that a method ranks first, and as many without random ones."""

    top: tuple[int, ...] = (50,)
    """How many of the highest ranked images are left out; several numbers make a curve."""
    ways: tuple[Way, ...] = ("without",)
    """without: train on all but the top images. only: train on nothing but them."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of training, at least two; every model is trained with each, that of all images too: how far two of these
    are apart is the noise floor."""
    same_steps: bool = True
    """Take about as many optimizer steps as the run did, in whole epochs, so that what differs is the images and not
    the length of training; otherwise as many epochs."""
    random_seed: int = 0
    """Seed of the random images. Those of each seed of training are other ones."""
    measure: str = "loss"
    """Which output of the models is compared: loss, mse, squares, simplified_elbo, elbo."""
    sample_seed: int = 0
    """Seed that generated queries were sampled with, as in whence sample."""
    sample_steps: int = 50
    """Denoising steps that generated queries were sampled with."""
    encoder: str | None = None
    """Also compare features of the generated images: folder of a transformers model, hub:NAME, module:function or
    FILE.py:function, as of whence trace."""


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled from a model."""

    prompts: Sequence[str] = ()
    """Captions or labels, of a model that is told these; the empty one stands for none."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance; 1 is the model's own prediction."""
    steps: int = 50
    """Denoising steps: of DDIM, or Euler's of flow matching."""
    seed: int = 0
    """Seed of the noise; the k-th image depends on it and k alone."""
    trajectory: bool = False
    """Also keep what the sampler took each image to be at each step, as journey-trak needs it."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How scores are compared with models trained again."""

    measure: str = "loss"
    """Which output of the models."""
    fit_subsets: int | None = None
    """Fit empirical influence and datamodels on so many of the subsets, the first ones, and evaluate everything on the
    others."""
    draws: int = 1000
    """Resamples of queries and subsets for the interval."""
    seed: int = 0
    """Seed of the resamples."""


Reason = Literal["duplicate", "outlier", "harmful"]


@dataclass(frozen=True)
class CleaningSettings:
    """What makes an image leave the cleaned data set. The defaults are conservative."""

    reasons: tuple[Reason, ...] | None = None
    """What to look for. By default all for which there are scores; duplicates need none."""
    near: float = 0.02
    """Two images are near duplicates up to this root mean square difference of their pixels in [-1, 1]: 0.02 is 2.5
    grey levels of 255. 0: only images that are equal in every pixel."""
    outlier_z: float = 5.0
    """Robust z-score of the logarithm of self-influence from which an image is an outlier."""
    harmful_z: float = 5.0
    """An image is harmful where its mean score over the validation queries is negative and its robust z-score is minus
    this or lower."""
    top: int = 50
    """An image is generally influential where it is among so many highest ranked of many queries; told, not removed."""
