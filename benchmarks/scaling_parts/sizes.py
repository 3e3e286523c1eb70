"""What is measured: models and batches, for GPUs and, to try the script, for CPUs."""

from dataclasses import dataclass

from polymamba.core import BackboneConfig, LanguageModelConfig, MoEConfig


@dataclass(frozen=True)
class Sizes:
    lm: BackboneConfig
    lm_length: int
    lm_batch: int  # of each GPU, weak; all of them share 4 times, and 16 times as many, strong
    image_model: str
    image_size: int
    image_batch: int  # as lm_batch; strong: 4 times as many
    dna: BackboneConfig
    dna_length: int  # of the piece of each GPU, weak
    dna_longest: int
    experts: BackboneConfig
    experts_batch: int


FULL = Sizes(
    lm=BackboneConfig(d_model=768, n_layer=34),  # 129M
    lm_length=2048,
    lm_batch=8,
    image_model="vmamba_tiny_s1l8",
    image_size=224,
    image_batch=128,
    dna=BackboneConfig(d_model=256, n_layer=16),  # 7M
    dna_length=1 << 19,
    dna_longest=1 << 22,
    experts=BackboneConfig(d_model=512, n_layer=16, pattern=("mamba", "moe"), moe=MoEConfig(n_experts=32)),
    experts_batch=8,
)
TINY = Sizes(
    lm=BackboneConfig(d_model=16, n_layer=2),
    lm_length=32,
    lm_batch=1,
    image_model="test_vmamba",
    image_size=16,
    image_batch=2,
    dna=BackboneConfig(d_model=16, n_layer=2),
    dna_length=128,
    dna_longest=512,
    experts=BackboneConfig(d_model=16, n_layer=2, pattern=("mamba", "moe"), moe=MoEConfig(n_experts=8)),
    experts_batch=1,
)


def byte_model(backbone: BackboneConfig) -> LanguageModelConfig:
    return LanguageModelConfig(backbone=backbone, vocab_size=320, tie_embeddings=False)
