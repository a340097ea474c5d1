"""The baseline with a frozen retriever: chunked cross attention to neighbours that nothing learns to choose."""

from models.rpt.cache import RPTCache
from models.rpt.configuration_rpt import RPTConfig
from models.rpt.encoders import DenseRetriever, MeanPooledEncoder
from models.rpt.modeling_rpt import RPTForCausalLM
from models.rpt.retrievers import BM25Retriever, OracleRetriever, RandomRetriever, Retriever

__all__ = [
    "BM25Retriever",
    "DenseRetriever",
    "MeanPooledEncoder",
    "OracleRetriever",
    "RPTCache",
    "RPTConfig",
    "RPTForCausalLM",
    "RandomRetriever",
    "Retriever",
]
