"""Multi-token-prediction modules against those that transformers reads from a checkpoint for drafting."""

import jax
import numpy as np
import pytest

from dsv3_jax.interop.huggingface import load_hf, save_hf
from dsv3_jax.models.transformer import Transformer
from tests.conftest import assert_close
from tests.interop.tiny import SIGMOID, latent, random_variables, with_mtp

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch: make peers")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers on torch: make peers")
layers = pytest.importorskip("transformers.modeling_layers")
if not hasattr(layers, "MtpModel"):
    pytest.skip("this transformers has no MtpModel", allow_module_level=True)

LENGTH = 13


def test_logits_of_two_modules_of_our_checkpoint(tmp_path):
    """Modules get tokens and positions shifted by one each: rotations are relative, so that ours, which stay at those
    of the hidden state, give the same. Between modules transformers hands on the normed hidden state, others (vLLM) and
    we what the block gives; without its norm their first module is ours.
    """
    config = with_mtp(latent(SIGMOID), 2)
    save_hf(tmp_path, config, random_variables(config))
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    # By default they look for layers with the number of the published model's module.
    theirs._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[34]\."]
    modules = layers.MtpModel.from_pretrained(theirs)
    modules.config._attn_implementation = "eager"
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH))
    expected = []
    with torch.no_grad():
        tokens_BT = torch.from_numpy(tokens)
        hidden = theirs(tokens_BT, output_hidden_states=True).hidden_states[-1]
        for index, module in enumerate(modules.layers):
            n = LENGTH - 1 - index
            positions = torch.arange(index + 1, LENGTH)[None].expand(2, -1)
            arguments = index, hidden[:, :n], positions, None, tokens_BT[:, index + 1 :]
            expected.append(modules._project_to_logits(modules.forward_layer(*arguments)).numpy())
            module.use_post_norm = False
            hidden = modules.forward_layer(*arguments)

    config, variables = load_hf(tmp_path)
    output = jax.jit(lambda v, t: Transformer(config).apply(v, t, predict_ahead=True))(variables, tokens)
    for index, logits_BTV in enumerate(expected):
        ours = output.prediction.hidden_kBTD[index, :, : LENGTH - 1 - index] @ variables["params"]["head"]
        assert_close(ours, logits_BTV, 1e-4, f"module {index}")  # float32 on both sides; sums in another order
