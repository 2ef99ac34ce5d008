"""BibTeX of the methods behind a model."""

from typing import Any

from diffusers_ext.cards.folder import Contents


ENTRIES = {
    "ddpm": """@inproceedings{ho2020denoising,
  title = {Denoising Diffusion Probabilistic Models},
  author = {Ho, Jonathan and Jain, Ajay and Abbeel, Pieter},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020}
}""",
    "improved": """@inproceedings{nichol2021improved,
  title = {Improved Denoising Diffusion Probabilistic Models},
  author = {Nichol, Alexander Quinn and Dhariwal, Prafulla},
  booktitle = {International Conference on Machine Learning},
  year = {2021}
}""",
    "adm": """@inproceedings{dhariwal2021diffusion,
  title = {Diffusion Models Beat {GANs} on Image Synthesis},
  author = {Dhariwal, Prafulla and Nichol, Alexander},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021}
}""",
    "ddim": """@inproceedings{song2021denoising,
  title = {Denoising Diffusion Implicit Models},
  author = {Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
  booktitle = {International Conference on Learning Representations},
  year = {2021}
}""",
    "dit": """@inproceedings{peebles2023scalable,
  title = {Scalable Diffusion Models with Transformers},
  author = {Peebles, William and Xie, Saining},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2023}
}""",
    "gqa": """@inproceedings{ainslie2023gqa,
  title = {{GQA}: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints},
  author = {Ainslie, Joshua and Lee-Thorp, James and de Jong, Michiel and Zemlyanskiy, Yury and Lebr{\\'o}n, Federico
            and Sanghai, Sumit},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  year = {2023}
}""",
    "film": """@inproceedings{perez2018film,
  title = {{FiLM}: Visual Reasoning with a General Conditioning Layer},
  author = {Perez, Ethan and Strub, Florian and de Vries, Harm and Dumoulin, Vincent and Courville, Aaron},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2018}
}""",
    "cfg": """@article{ho2022classifier,
  title = {Classifier-Free Diffusion Guidance},
  author = {Ho, Jonathan and Salimans, Tim},
  journal = {arXiv preprint arXiv:2207.12598},
  year = {2022}
}""",
    "autoguidance": """@inproceedings{karras2024guiding,
  title = {Guiding a Diffusion Model with a Bad Version of Itself},
  author = {Karras, Tero and Aittala, Miika and Kynk{\\"a}{\\"a}nniemi, Tuomas and Lehtinen, Jaakko and Aila, Timo
            and Laine, Samuli},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}
}""",
    "v": """@inproceedings{salimans2022progressive,
  title = {Progressive Distillation for Fast Sampling of Diffusion Models},
  author = {Salimans, Tim and Ho, Jonathan},
  booktitle = {International Conference on Learning Representations},
  year = {2022}
}""",
    "flow": """@inproceedings{liu2023flow,
  title = {Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow},
  author = {Liu, Xingchao and Gong, Chengyue and Liu, Qiang},
  booktitle = {International Conference on Learning Representations},
  year = {2023}
}""",
    "ldm": """@inproceedings{rombach2022high,
  title = {High-Resolution Image Synthesis with Latent Diffusion Models},
  author = {Rombach, Robin and Blattmann, Andreas and Lorenz, Dominik and Esser, Patrick and Ommer, Bj{\\"o}rn},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2022}
}""",
    "lora": """@inproceedings{hu2022lora,
  title = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean
            and Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year = {2022}
}""",
    "dilated": """@inproceedings{yu2016multi,
  title = {Multi-Scale Context Aggregation by Dilated Convolutions},
  author = {Yu, Fisher and Koltun, Vladlen},
  booktitle = {International Conference on Learning Representations},
  year = {2016}
}""",
}
_OF_CLASSES = {
    "ADMUNet2DModel": ("adm",),
    "ADMClassifierModel": ("adm",),
    "DDPMUNet2DModel": ("ddpm",),
    "DilatedConvDenoiserModel": ("ddpm", "dilated"),
    "ComposableUNet2DModel": ("ddpm",),
    "GQADiTTransformer2DModel": ("dit",),
    "DiTTransformer2DModel": ("dit",),
    "UNet2DModel": ("ddpm",),
    "UNet2DConditionModel": ("ldm",),
    "AutoencoderKL": ("ldm",),
    "DDIMScheduler": ("ddim",),
    "FlowMatchEulerDiscreteScheduler": ("flow",),
    "ClassifierGuidedPipeline": ("adm",),
}


def citations(contents: Contents) -> list[str]:
    """BibTeX entries for the classes and options in a folder, what the model is first."""
    found = ["lora"] if contents.kind == "lora" else []
    denoiser = contents.denoiser
    for part in contents.parts.values():
        found += _OF_CLASSES.get(part.class_name, ()) + _of_config(part.config)
    found += _OF_CLASSES.get(contents.class_name, ())
    if "Classifier" not in contents.class_name and denoiser and denoiser.config.get("null_class"):
        found.append("cfg")
    if "guide_model" in contents.parts:
        found.append("autoguidance")
    return [ENTRIES[key] for key in dict.fromkeys(found)]


def _of_config(config: dict[str, Any]) -> tuple[str, ...]:
    found = []
    if config.get("class_conditioning") == "film" or config.get("time_conditioning") == "film":
        found.append("film")
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and shared < heads:
        found.append("gqa")
    if str(config.get("variance_type")).startswith("learned"):
        found.append("improved")
    if config.get("prediction_type") == "v_prediction":
        found.append("v")
    return tuple(found)
