"""What is asked for: what cannot be used is refused with its value before anything is computed or written."""

import pytest
from tiny import config

from gdiff_jax.errors import ConfigError
from gdiff_jax.methods import METHODS
from gdiff_jax.options import replace
from gdiff_jax.sweeping import checks, inputs
from gdiff_jax.sweeping.attackers import ATTACKERS, Attacker, Knowledge
from gdiff_jax.sweeping.config import DEFAULT_SIGMAS, Noise, SweepConfig

BAD = [
    (dict(sigma_grid=(0.0, -0.1)), "-0.1"),
    (dict(sigma_grid=(float("nan"),)), "nan"),
    (dict(sigma_grid=(float("inf"),)), "inf"),
    (dict(sigma_grid=(0.1, 0.1)), "repeats"),
    (dict(methods=("ddrm",)), "ddrm"),
    (dict(methods=()), "--methods"),
    (dict(victims=("vgg",)), "vgg"),
    (dict(victims=()), "--victims"),
    (dict(images="gdiff-no-such-folder"), "gdiff-no-such-folder"),
    (dict(images="cifar10-test-64"), "(32, 32, 3)"),
    (dict(num_images=7), "7"),
    (dict(label=10), "10"),
    (dict(num_classes=2), "outside 0..1"),
    (dict(steps=1001), "1001"),
    (dict(steps=0), "0"),
    (dict(batch=0), "batch"),
    (dict(seeds=0), "--seeds 0"),
    (dict(memory_gib=-1.0), "--memory_gib -1.0"),
    (dict(guidance_rate=1.5), "1.5"),
    (dict(calibrated_rate=-0.1), "--calibrated_rate -0.1"),
    (dict(interval=0), "--interval 0"),
    (dict(zeta=-1.0), "-1.0"),
    (dict(spacing="cubic"), "cubic"),
    (dict(clip="maybe"), "--clip 'maybe'"),
    (dict(prior="no-such-prior"), "no-such-prior"),
    (dict(prior_dtype="float8"), "float8"),
    (dict(training_steps=(5,)), "gdiff-train-victim --victim=mlp"),
    (dict(training_steps=(-5,)), "--training_steps -5"),
    (dict(mechanisms=()), "mechanisms"),
    (dict(mechanisms=("gauss",)), "'gauss' is not known"),
    (dict(mechanisms=("clip+gaussian",)), "clip:1"),
    (dict(mechanisms=("clip:-1+gaussian",)), "above 0"),
    (dict(mechanisms=("topk:0",)), "topk:0.1"),
    (dict(mechanisms=("qsgd:2.5",)), "number of levels"),
    (dict(mechanisms=("soteria:1",)), "share of features"),
    (dict(mechanisms=("gaussian:0.1",)), "takes no number"),
    (dict(epsilon_grid=(1.0,)), "clip:1+gaussian"),
    (dict(epsilon_grid=(0.0,), mechanisms=("clip:1+gaussian",)), "0.0"),
    (dict(epsilon_grid=(1.0,), mechanisms=("clip:1+laplace",)), "clip:1+laplace"),
    (dict(epsilon_grid=(1.0,), mechanisms=("clip:1",)), "clip:1 adds no noise"),
    (dict(sigma_grid=(0.0, 0.1), mechanisms=("topk:0.1",)), "say topk:0.1+gaussian, or leave --sigma_grid out"),
    (dict(sigma_grid=(0.1,), mechanisms=("none",)), "say gaussian, or leave"),
    (dict(seed=-1), "seed -1"),
    (dict(delta=0.0), "delta 0.0"),
    (dict(attacker="god"), "'god'"),
    (dict(labels="guessed"), "'guessed'"),
    (dict(local_rate="none"), "'none'"),
    (dict(statistics="running"), "'running'"),
    (dict(distance="linf"), "'linf'"),
    (dict(layer_weights="some"), "'some'"),
    (dict(methods=("dsg", "all")), "'all'"),
    (dict(methods=("analytic",), victims=("lenet",)), "such as mlp"),
    (dict(methods=("analytic",), group=3), "--group=3"),
    (dict(group=2), "ask for 4"),
    (dict(group=0), "--group 0"),
    (dict(group=3, local_batch=2, local_steps=2), "--local_batch 2"),
    (dict(group=3, local_batch=1), "--local_steps"),
    (dict(local_steps=0), "--local_steps 0"),
    (dict(local_learning_rate=0.0), "--local_learning_rate 0.0"),
    (dict(local_steps=2, victims=("cnn-batchnorm",)), "--statistics=batch"),
    (dict(labels="joint", methods=("dlg",), victims=("cnn-batchnorm",)), "--statistics=batch"),
    (dict(local_steps=2, local_rate="guessed", mechanisms=("clip:1+gaussian",)), "--noadaptive"),
    (dict(dlg_steps=0), "--dlg_steps 0"),
    (dict(inverting_steps=0), "--inverting_steps 0"),
    (dict(restarts=0), "--restarts 0"),
    (dict(chains=1), "--chains 1"),
    (dict(tv=-1.0), "--tv -1.0"),
    (dict(red_diff_weight=float("inf")), "--red_diff_weight inf"),
]


@pytest.mark.parametrize(("changes", "value"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_is_refused_with_its_value(tiny_prior, tmp_path, changes, value):
    with pytest.raises(ConfigError) as caught:
        inputs.load(config(tiny_prior, tmp_path / "out", **changes))
    assert value in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sigmas", "epsilons", "expected"),
    [
        ((), (), DEFAULT_SIGMAS),
        ((), (1.0,), ()),
        ((0.3, 0.1), (), (0.3, 0.1)),
        ((0.3, 0.1), (1.0,), (0.3, 0.1)),
    ],
)
def test_the_default_grid_is_run_where_no_noise_is_named(sigmas, epsilons, expected):
    noise = Noise(sigmas, epsilons)
    noise.check()
    assert noise.sigmas == expected


def test_attackers_know_what_the_user_did_not_say():
    assert Attacker().knowledge == ATTACKERS["informed"] == Knowledge("known", True, "known", "known")
    assert Attacker("eavesdropper", labels="known").knowledge == Knowledge("known", False, "guessed", "replaced")
    assert Attacker("eavesdropper", adaptive=True, local_rate="known").knowledge == Knowledge(
        "inferred", True, "known", "replaced"
    )
    assert Attacker("server").knowledge == ATTACKERS["server"]
    assert Attacker(adaptive=False, statistics="batch").knowledge == Knowledge("known", False, "known", "batch")


def written_out(**changes):
    c = replace(SweepConfig(), **{"methods": ("all",), **changes})
    return checks.write_out_all(c, inputs.parse_mechanisms(c.mechanisms)).attacks.methods


def test_methods_all_leaves_out_what_cannot_be_run():
    every = set(METHODS)
    conv = every - {"analytic", "analytic-dsg", "analytic-mean"}
    for changes, expected in (
        (dict(victims=("cnn", "mlp-wide")), every),
        (dict(victims=("cnn",)), conv),
        (dict(victims=("mlp",), group=2, num_images=4), conv),
        (dict(methods=("dlg",)), {"dlg"}),
    ):
        assert set(written_out(**changes)) == expected
    assert "calibrated-dsg" in written_out(victims=("mlp",), group=2, num_images=4, chains=2)
    assert "calibrated-dsg" not in written_out(victims=("mlp",), group=2, num_images=4, chains=2, adaptive=False)


@pytest.mark.parametrize(("chains", "refined"), [(2, 2), (4, 2), (8, 4)])
def test_auto_searches_by_as_many_chains_as_asked_for_and_half_as_many_where_it_refines(chains, refined):
    auto = replace(SweepConfig(), chains=chains).attacks.make()["auto"]
    assert (auto.search.chains, auto.start.chains) == (chains, refined)


def hindrances(method, **changes):
    c = replace(SweepConfig(), **changes)
    mechanisms = inputs.parse_mechanisms(c.mechanisms)
    return checks.hindrances(METHODS[method], c.attacker, c.client, c.attacks.distance, mechanisms)


def test_calibrated_methods_are_left_to_those_who_know_the_mechanism(tiny_prior):
    load = lambda **changes: inputs.load(config(tiny_prior, "unused", methods=("calibrated-dsg", "calibrated-mean"), **changes))
    with pytest.raises(ConfigError, match="cannot be run with --noadaptive: it draws from the noise"):
        load(adaptive=False)
    with pytest.raises(ConfigError, match="--distance=cosine --local_steps=2"):
        load(distance="cosine", local_steps=2)
    with pytest.raises(ConfigError, match=r"--mechanisms=soteria:0.5\+gaussian"):
        load(mechanisms=("soteria:0.5+gaussian",))
    assert not hindrances("calibrated-mean", mechanisms=("soteria:0.5", "gaussian+soteria:0.5"))
    assert hindrances("analytic-dsg", attacker="eavesdropper") == ["--attacker=eavesdropper"]
    assert not hindrances("dsg", attacker="eavesdropper", distance="cosine", local_steps=2)
