import torch

from kdtune.data import Batch
from kdtune.models import llama
from kdtune.teachers import OnlineTeacher


def tiny():
    torch.manual_seed(0)
    return llama(
        vocab_size=16, embed_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_dim=12, max_seq_len=16
    )


def test_gives_the_models_hidden_states_and_head_without_a_graph():
    model = tiny().train()
    teacher = OnlineTeacher(model)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    signal = teacher(Batch.from_labels(tokens, torch.full_like(tokens, -100)))
    assert not signal.hidden_BSD.requires_grad
    assert signal.output is model.output
    torch.testing.assert_close(model.output(signal.hidden_BSD), tiny().eval()(tokens))


def test_is_frozen_and_stays_in_eval_mode():
    model = tiny().train()
    teacher = OnlineTeacher(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    model.train()  # somebody else's doing
    tokens = torch.tensor([[1, 2]])
    teacher(Batch.from_labels(tokens, tokens))
    assert not any(module.training for module in model.modules())
    assert torch.is_grad_enabled()
