"""Models made by frameworks: the backbone is found, or refused with the call to make, and stays frozen."""

from __future__ import annotations

import contextlib
import functools
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import census_frameworks
import pytest
import torch
import zoo
from torch import Tensor, nn

import freezekit
from freezekit import FreezekitError, SelectionError, find_backbone, freeze_backbone
from freezekit.freezing.base_models import _speaks_of

# PEFT asks transformers by a name that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}


def on_meta(name: str, classes: int) -> nn.Module:
    pytest.importorskip("transformers")
    return census_frameworks.quietly(functools.partial(census_frameworks.transformer, name), classes)


def below(name: str, scopes: Iterable[str]) -> bool:
    return any(name == scope or name.startswith(f"{scope}.") for scope in scopes)


def state(model: nn.Module) -> list[Any]:
    """Everything that undo() promises to bring back."""
    return [
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, id(m), type(m), m.training, sorted(m.__dict__)) for name, m in model.named_modules()],
    ]


def judge(name: str, build: Callable[[int], nn.Module]) -> str:
    """Hold a model to the truth that nobody labelled by hand, and to the round trip; return how it went."""
    model = build(10)
    shapes = {n: p.shape for n, p in build(11).named_parameters()}
    truth = [n for n, p in model.named_parameters() if p.shape != shapes[n]]
    assert truth, name
    try:
        selection = find_backbone(model)
    except SelectionError as error:
        # with the call to make
        return f"refused: {error.what}" if "freezekit.freeze" in str(error.remedy) else f"mute: {error}"
    assert all(below(n, selection.head) for n in truth), (name, truth)
    base = getattr(model, "base_model_prefix", "")
    if model._modules.get(base) is not None and not any(below(n, [base]) for n in truth):
        # what is in the base model is backbone, but for the pooler
        rest = [n for n, _ in model.named_parameters() if below(n, [base]) and "pooler" not in n]
        assert rest
        assert all(below(n, selection.backbone) for n in rest), name
        # a base model that is not held whole must not ask for the mode itself
        kinds = [
            c for c in type(model._modules[base]).__mro__ if c.__module__.startswith("transformers.models")
        ]
        if base not in selection.backbone:
            own = [f for kind in kinds for f in vars(kind).values() if inspect.isfunction(f)]
            own = [f for f in own if not _speaks_of(f, "gradient_checkpointing")]  # there it is about a cache
            assert not any(_speaks_of(f, "training") for f in own), name
    before = state(model)
    try:
        handle = freeze_backbone(model)
    except FreezekitError as error:
        if "train() of its own" not in error.what:
            raise
        before = state(model.eval())
        handle = freeze_backbone(model)
    frozen = set(handle.frozen)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert {n for n in parameters if below(n, selection.backbone)} == frozen & set(parameters), name
    assert not any(below(n, frozen) for n in truth), name
    handle.undo()
    assert state(model) == before, name
    return "ok"


@pytest.mark.parametrize("name", census_frameworks.SAMPLE)
def test_the_head_is_what_the_number_of_classes_changes(name: str) -> None:
    for package in {"smp": ["segmentation_models_pytorch"], "lightning": ["lightning", "timm"]}.get(
        name.partition("/")[0], ["transformers", "timm", name.partition("/")[0]]
    ):
        pytest.importorskip(package)
    build = census_frameworks.models().get(name)
    if build is None:
        pytest.skip("not in this version of the library")
    try:
        verdict = judge(name, build)
    except census_frameworks.CannotBuildError as reason:
        pytest.skip(f"cannot be built from its defaults in this version: {reason.__cause__}")
    refused = ("RTDetr", "Perceiver")
    assert verdict.startswith("refused") == any(part in name for part in refused), verdict


@pytest.mark.census
def test_every_model_of_the_frameworks() -> None:
    models = census_frameworks.models()
    verdicts: dict[str, str] = {}
    for name, build in models.items():
        with contextlib.suppress(census_frameworks.CannotBuildError):
            verdicts[name] = judge(name, build)
    refused = {name: verdict for name, verdict in verdicts.items() if verdict != "ok"}
    assert all(verdict.startswith("refused: ") for verdict in refused.values())
    print(f"{len(models)} models, {len(verdicts) - len(refused)} right, {len(refused)} refused, none wrong")
    for name, verdict in refused.items():
        print(f"  {name}: {verdict}")
    assert len(verdicts) >= 0.9 * len(models)
    assert len(refused) <= 0.1 * len(models)


@pytest.mark.census
def test_what_is_frozen_is_all_in_the_bare_base_model() -> None:
    """Another truth nobody labelled: a pretrained checkpoint has the tensors of the bare base model."""
    mapping = pytest.importorskip("transformers.models.auto.modeling_auto").MODEL_MAPPING
    done = 0
    for name, build in census_frameworks.models().items():
        try:
            model = build(10)
            selection = find_backbone(model)
            bare = census_frameworks.quietly(lambda kind: kind(model.config), mapping[type(model.config)])  # noqa: B023
        except (AttributeError, KeyError, SelectionError, TypeError, census_frameworks.CannotBuildError):
            continue  # not of transformers, refused, or without a bare model
        shapes = {n: t.shape for n, t in bare.state_dict().items()}
        for full, parameter in model.named_parameters():
            if below(full, selection.backbone):
                parts = full.replace(".base_layer.", ".").split(".")  # as PEFT wraps it
                assert parameter.shape in [shapes.get(".".join(parts[k:])) for k in range(len(parts))], (
                    name,
                    full,
                )
        done += 1
    assert done >= 100


@pytest.mark.census
@pytest.mark.parametrize("table", ["QUESTION_ANSWERING", "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION"])
def test_heads_of_a_fixed_size_are_what_is_beside_the_base_model(table: str) -> None:
    modeling_auto = pytest.importorskip("transformers.models.auto.modeling_auto")

    done = 0
    for name in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
        try:
            model = on_meta(name, 2)
            selection = find_backbone(model)
        except (census_frameworks.CannotBuildError, SelectionError):
            continue
        base = (
            [model.base_model_prefix]
            if hasattr(model, model.base_model_prefix)
            else ["shared", "encoder", "decoder"]
        )
        for tensor, _ in model.named_parameters():
            inside = below(tensor, base) and "pooler" not in tensor
            assert below(tensor, selection.backbone if inside else selection.head), (name, tensor)
        done += 1
    assert done >= 5


def bert(kind: str = "BertForSequenceClassification", **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=50, **{"num_labels": 3, **TINY, **settings})
    return zoo.scramble(getattr(transformers, kind)(config))


def llama(**settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **TINY, **settings)
    return zoo.scramble(transformers.LlamaForCausalLM(config))


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(seed))


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(freezekit.trainable_parameters(model), lr=0.05)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


class TestTransformers:
    def test_training_moves_the_head_alone(self) -> None:
        model = bert().eval()
        expected = model.bert(tokens()).last_hidden_state
        handle = freeze_backbone(model)
        assert handle.selection.backbone == ("bert.embeddings", "bert.encoder")
        assert handle.selection.head == ("dropout", "classifier", "bert.pooler")
        before = zoo.snapshot(model)
        fit(model, lambda: model(input_ids=tokens(), labels=torch.tensor([0, 1, 2, 0])).loss)
        after = zoo.snapshot(model)
        assert {n for n in before if before[n] != after[n]} == set(handle.trainable)
        # in train mode, with dropout of 0.1 all over, the body gives what it gave in eval mode
        assert model.training
        assert model.dropout.training
        assert torch.equal(model.bert(tokens()).last_hidden_state, expected)
        handle.undo()
        assert all(p.requires_grad for p in model.parameters())

    def test_a_model_of_ones_own_on_a_base_model(self) -> None:
        transformers = pytest.importorskip("transformers")

        class Mine(transformers.BertPreTrainedModel):  # type: ignore[misc,name-defined]
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.out = nn.Linear(32, 5)
                self.bert = transformers.BertModel(config, add_pooling_layer=False)
                self.scale = nn.Parameter(torch.ones(()))
                self.post_init()

        selection = find_backbone(Mine(transformers.BertConfig(vocab_size=50, **TINY)))
        assert selection.backbone == ("bert",)
        assert set(selection.head) == {"out", "scale"}

    def test_the_pooler_of_a_base_model_inside_a_model_of_ones_own_trains(self) -> None:
        model = nn.Sequential()
        model.add_module("text", bert("BertModel"))
        model.add_module("classifier", nn.Linear(32, 3))
        selection = find_backbone(model)
        assert selection.backbone == ("text.embeddings", "text.encoder")
        assert selection.head == ("classifier", "text.pooler")

    def test_an_untied_output_is_a_head(self) -> None:
        selection = find_backbone(llama(tie_word_embeddings=False))
        assert (selection.backbone, selection.head) == (("model",), ("lm_head",))

    def test_a_model_with_a_train_of_its_own_is_frozen_in_train_mode_too(self) -> None:
        model = llama(tie_word_embeddings=False).train()
        freeze_backbone(model)
        assert not model.train().model.training

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (
                lambda: llama(tie_word_embeddings=True),
                "embed_tokens.weight is lm_head.weight.*freeze.model, 'model'",
            ),
            (lambda: bert("BertForMaskedLM"), r"word_embeddings.weight is cls.predictions.decoder.weight"),
            (lambda: bert("BertModel"), r"BertModel is not made for a task.*freeze.model, \"\*\""),
            (
                lambda: on_meta("ViTForImageClassification", 0),
                r"no head with parameters.*put the new head in place",
            ),
        ],
    )
    def test_refused(self, make: Callable[[], nn.Module], match: str) -> None:
        with pytest.raises(SelectionError, match=match):
            freeze_backbone(make())

    def test_the_call_that_tied_embeddings_are_refused_with(self) -> None:
        model = bert("BertForMaskedLM")
        handle = freezekit.freeze(model, "bert")
        assert "cls.predictions.decoder.weight" in handle.frozen
        assert "cls.predictions.transform.dense.weight" in handle.trainable

    def test_an_adapter_is_refused_since_it_may_be_new(self) -> None:
        transformers = pytest.importorskip("transformers")
        with torch.device("meta"):
            config = transformers.Wav2Vec2Config(num_hidden_layers=1, add_adapter=True)
            model = transformers.Wav2Vec2ForCTC(config)
        with pytest.raises(
            SelectionError, match=r"whether the adapter .*head=\['wav2vec2.adapter', 'dropout', "
        ):
            find_backbone(model)
        freeze_backbone(model, head=["wav2vec2.adapter", "dropout", "lm_head"])

    def test_adapters_of_ones_own_are_refused(self) -> None:
        class WithLoRA(nn.Module):
            def __init__(self, linear: nn.Linear) -> None:
                super().__init__()
                self.linear, self.a = linear, nn.Linear(32, 2)

        model = bert()
        for layer in model.bert.encoder.layer:
            layer.attention.self.query = WithLoRA(layer.attention.self.query)
            layer.output.adapter = nn.Sequential(nn.Linear(32, 2), nn.Linear(2, 32))
        with pytest.raises(SelectionError, match="other new layers") as caught:
            find_backbone(model)
        eval(str(caught.value).partition("for example ")[2], {"freezekit": freezekit, "model": model})
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert "bert.encoder.layer.1.attention.self.query.a.weight" in trains
        assert "bert.encoder.layer.1.output.adapter.0.weight" in trains
        assert "bert.encoder.layer.1.attention.self.key.weight" not in trains

    def test_layers_for_the_classes_inside_the_base_model(self) -> None:
        pytest.importorskip("transformers")
        model = on_meta("RTDetrForObjectDetection", 5)
        with pytest.raises(
            SelectionError, match=r"made for the number of classes.*backbone='model.backbone'"
        ):
            find_backbone(model)
        assert freeze_backbone(model, backbone="model.backbone").selection.backbone == ("model.backbone",)

    def test_a_part_that_does_not_come_first_is_no_base_model(self) -> None:
        pytest.importorskip("timm")
        transformers = pytest.importorskip("transformers")
        if not hasattr(transformers, "OmDetTurboForObjectDetection"):
            pytest.skip("not in this version")
        model = on_meta("OmDetTurboForObjectDetection", 5)
        with pytest.raises(SelectionError, match="decoder could be, or a part of it"):
            find_backbone(model)

    def test_a_backbone_of_timm_inside(self) -> None:
        pytest.importorskip("timm")
        transformers = pytest.importorskip("transformers")
        settings = {"backbone": "resnet18", "use_timm_backbone": True, "use_pretrained_backbone": False}
        with torch.device("meta"):
            config = transformers.DetrConfig(encoder_layers=1, decoder_layers=1, num_labels=5, **settings)
            model = transformers.DetrForObjectDetection(config)
        selection = find_backbone(model)
        assert (selection.backbone, selection.head) == (
            ("model",),
            ("class_labels_classifier", "bbox_predictor"),
        )
        assert any("timm" in type(m).__module__ for m in model.modules())


def test_segmentation_training_moves_decoder_and_head() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = zoo.scramble(smp.Unet("resnet18", encoder_weights=None, classes=3)).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = [f.clone() for f in model.encoder(x)]
    handle = freeze_backbone(model)
    assert handle.selection.backbone == ("encoder",)
    assert handle.selection.head == ("decoder", "segmentation_head")
    before = zoo.snapshot(model)
    fit(model, lambda: model(x).square().mean(), steps=2)
    after = zoo.snapshot(model)
    moved = {n for n in before if before[n] != after[n]}
    assert {n.partition(".")[0] for n in moved} == {"decoder", "segmentation_head"}
    assert set(handle.trainable) <= moved
    assert all(torch.equal(a, b) for a, b in zip(model.train().encoder(x), expected, strict=True))


def lightning_class() -> type[Any]:
    lightning = pytest.importorskip("lightning")
    torchmetrics = pytest.importorskip("torchmetrics")

    class Classifier(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, **children: nn.Module) -> None:
            super().__init__()
            self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)
            self.loss = nn.CrossEntropyLoss()
            for name, child in children.items():
                self.add_module(name, child)

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            logits = self(batch[0])
            self.accuracy(logits, batch[1])
            loss: Tensor = self.loss(logits, batch[1])
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(freezekit.trainable_parameters(self), lr=0.1)

    return Classifier


class TestLightning:
    # Lightning remarks on few workers and on the layers held in eval mode, and uses what torch has deprecated
    @pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
    @pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
    @pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
    def test_fit_moves_the_head_alone(self) -> None:
        kind = lightning_class()
        import lightning

        module = kind(net=zoo.make("resnet18"))
        handle = freeze_backbone(module)
        assert handle.selection.head == ("net.fc",)
        assert all(name.startswith("net.") for name in handle.selection.backbone)
        before = zoo.snapshot(module)
        data = torch.utils.data.TensorDataset(zoo.images("resnet18", 8), torch.arange(8) % 3)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
        after = zoo.snapshot(module)
        assert {n for n in before if before[n] != after[n]} == {"net.fc.weight", "net.fc.bias"}
        assert trainer.global_step == 4
        assert type(module.accuracy).__name__ == "MulticlassAccuracy"

    def test_backbone_and_head_as_children(self) -> None:
        module = lightning_class()(backbone=nn.Sequential(nn.Linear(4, 4)), head=nn.Linear(4, 3))
        selection = find_backbone(module)
        assert (selection.backbone, selection.head) == (("backbone",), ("head",))  # and no metric

    def test_a_loss_with_parameters_trains(self) -> None:
        module = lightning_class()(net=zoo.make("resnet18"), margin=nn.Bilinear(2, 2, 2))
        assert set(find_backbone(module).head) == {"net.fc", "margin"}

    def test_teacher_and_student_are_refused(self) -> None:
        module = lightning_class()(teacher=zoo.make("resnet18"), student=zoo.make("mobilenet_v2"))
        with pytest.raises(SelectionError, match=r"more than one reading.*head=\['student.classifier'\]"):
            find_backbone(module)

    def test_a_model_with_its_head_beside_another_head_is_refused(self) -> None:
        module = lightning_class()(net=zoo.make("resnet18"), head=nn.Linear(10, 3))
        with pytest.raises(SelectionError, match=r"more than one reading.*head=\['net.fc'"):
            find_backbone(module)

    def test_the_reason_of_the_model_inside_is_given(self) -> None:
        module = lightning_class()(net=nn.Sequential(nn.Linear(4, 4)))
        with pytest.raises(SelectionError, match=r"^model.net: .*Remedy: .*freeze_backbone.model.net, head="):
            find_backbone(module)


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(lora_dropout=0.5, **settings))
    return adapted


class TestPeft:
    def test_training_moves_adapters_and_the_copied_head(self) -> None:
        model = adapted(bert(), task_type="SEQ_CLS")
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        handle = freeze_backbone(model)
        assert set(handle.trainable) == trains  # PEFT's choice, neither more nor less
        layer = model.base_model.model.bert.encoder.layer[0]
        query = layer.attention.self.query
        assert query.lora_dropout.default in set(model.train().modules())
        assert query.lora_dropout.default.training
        assert not query.base_layer.training
        assert not layer.output.dropout.training
        before = zoo.snapshot(model)
        fit(model, lambda: model(input_ids=tokens(), labels=torch.tensor([0, 1, 2, 0])).loss)
        after = zoo.snapshot(model)
        assert {n for n in before if before[n] != after[n]} == trains
        handle.undo()
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trains

    def test_a_language_model_keeps_its_tied_output(self) -> None:
        model = adapted(llama(tie_word_embeddings=True), task_type="CAUSAL_LM")
        handle = freeze_backbone(model)
        assert handle.trainable
        assert all("lora_" in name for name in handle.trainable)
        assert "base_model.model.lm_head.weight" in handle.frozen

    def test_inside_another_framework(self) -> None:
        module = lightning_class()(net=adapted(bert(), task_type="SEQ_CLS"))
        handle = freeze_backbone(module)
        assert all("lora_" in n or "modules_to_save" in n for n in handle.trainable)

    def test_adapters_put_into_the_model_itself(self) -> None:
        peft = pytest.importorskip("peft")
        model = bert()
        model.add_adapter(peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
        trains = [n for n, p in model.named_parameters() if p.requires_grad]
        assert freeze_backbone(model).trainable == trains

    def test_a_new_head_that_peft_freezes_is_refused(self) -> None:
        model = adapted(bert(), target_modules=["query"])
        with pytest.raises(SelectionError, match=r"PEFT freezes this head.*modules_to_save=\['classifier'\]"):
            freeze_backbone(model)

    def test_a_new_head_of_timm_that_peft_freezes_is_refused(self) -> None:
        timm = pytest.importorskip("timm")
        peft = pytest.importorskip("peft")
        settings = peft.LoraConfig(target_modules=["qkv"])
        with pytest.raises(SelectionError, match=r"PEFT freezes this head.*modules_to_save=\['head'\]"):
            find_backbone(peft.get_peft_model(timm.create_model("test_vit", num_classes=3), settings))

    def test_a_base_that_trains_is_refused(self) -> None:
        model = adapted(bert(), task_type="SEQ_CLS", bias="all")
        with pytest.raises(
            SelectionError, match=r"no adapter train as well.*head=\['\*.bias', '\*.lora_dropout'"
        ):
            freeze_backbone(model)


def test_no_framework_is_imported() -> None:
    code = (
        "import sys, torch, freezekit\n"
        "from collections import OrderedDict\n"
        "L = torch.nn.Linear\n"
        "freezekit.freeze_backbone(torch.nn.Sequential(OrderedDict(stem=L(2, 2), fc=L(2, 2))))\n"
        "print({'transformers', 'peft', 'lightning', 'segmentation_models_pytorch'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
