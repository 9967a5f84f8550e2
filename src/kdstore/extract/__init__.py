"""Extraction: run a teacher once over a source and write its features to a store."""

from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import ExtractResult, extract

__all__ = ["ExtractConfig", "ExtractResult", "extract"]
