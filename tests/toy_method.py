"""A method of another package: all that one is. The embedding gets thinner, by its SVD."""

from dataclasses import dataclass

from torch import nn

from softlms.layers import svd
from softlms.methods.base import Config, Method
from softlms.modules import Replacement
from softlms.origin import remember
from softlms.ranges import check_at_least_one


@dataclass(frozen=True)
class ThinConfig(Config):
    """Settings: `width` numbers a word."""

    width: int = 4

    def __post_init__(self):
        check_at_least_one(width=self.width)


class ThinEmbedding(Replacement):
    """Codes of each word, and a decoder."""

    form = "thin embedding"

    def __init__(self, words, width, size):
        super().__init__()
        self.codes = nn.Embedding(words, width)
        self.decoder = nn.Linear(width, size, bias=False)

    def description(self):
        return {"width": self.codes.embedding_dim}

    @classmethod
    def skeleton(cls, dense, description):
        return cls(dense.num_embeddings, description["width"], dense.embedding_dim).to(dense.weight.device)

    def forward(self, ids):
        return self.decoder(self.codes(ids))


def apply(model, config, work):
    remember(model)
    dense = model.get_input_embeddings()
    thin = ThinEmbedding(dense.num_embeddings, config.width, dense.embedding_dim)
    U, sigma, V = svd(dense.weight)
    thin.codes.weight.data = (U * sigma)[:, : config.width].contiguous()
    thin.decoder.weight.data = V[:, : config.width].contiguous()
    model.set_input_embeddings(thin)
    return {"untuned": work.scores(lambda: model), "width": config.width}


METHOD = Method("thin", ThinConfig, apply, (ThinEmbedding,))
