"""The feature store: plan, write, read, join, verify (no torch; the only package that imports zarr)."""

from __future__ import annotations

from kdstore.store.ahead import gather_ahead
from kdstore.store.attempt import Attempt, open_attempt
from kdstore.store.cache import Cache
from kdstore.store.child import Family, child_identity, family_of, open_family, plan_child
from kdstore.store.codecfile import codec_files, codec_identity, kept_codec
from kdstore.store.codecs import Chain, Codec, fit_chain, parse_chain
from kdstore.store.concat import concat_stores
from kdstore.store.derive import DerivedStore, index_rows, read_keys
from kdstore.store.diff import ArrayDifference, StoreDifference, diff_stores
from kdstore.store.incomplete import Committer, StoreProgress, store_progress
from kdstore.store.join import Join, JoinReport, join_sources, report_join
from kdstore.store.layout import ArraySpec, embedding_array, scalar_array, token_array, view_array
from kdstore.store.lock import Holder, Lock, take_lock, unlock_store
from kdstore.store.order import Batches, Order
from kdstore.store.parts import finalise_store, leave_account, record_staged, stage_unit, staged_units
from kdstore.store.plan import Plan, Unit, fingerprint_of
from kdstore.store.reader import Store, open_store
from kdstore.store.recode import Encoding, recode_store
from kdstore.store.rows import Rows
from kdstore.store.signing import check_signature, check_store_signature, sign_store
from kdstore.store.stats import read_stats, sampled_covariance, store_stats
from kdstore.store.subset import subset_store
from kdstore.store.verify import Damage, VerifyReport, verify_store
from kdstore.store.views import StoredViews, stored_views
from kdstore.store.withdraw import Withdrawal, is_successor, withdraw_rows
from kdstore.store.writer import Begun, StoreWriter, check_place, read_begun

__all__ = [
    "ArrayDifference",
    "ArraySpec",
    "Attempt",
    "Batches",
    "Begun",
    "Cache",
    "Chain",
    "Codec",
    "Committer",
    "Damage",
    "DerivedStore",
    "Encoding",
    "Family",
    "Holder",
    "Join",
    "JoinReport",
    "Lock",
    "Order",
    "Plan",
    "Rows",
    "Store",
    "StoreDifference",
    "StoreProgress",
    "StoreWriter",
    "StoredViews",
    "Unit",
    "VerifyReport",
    "Withdrawal",
    "check_place",
    "check_signature",
    "check_store_signature",
    "child_identity",
    "codec_files",
    "codec_identity",
    "concat_stores",
    "diff_stores",
    "embedding_array",
    "family_of",
    "finalise_store",
    "fingerprint_of",
    "fit_chain",
    "gather_ahead",
    "index_rows",
    "is_successor",
    "join_sources",
    "kept_codec",
    "leave_account",
    "open_attempt",
    "open_family",
    "open_store",
    "parse_chain",
    "plan_child",
    "read_begun",
    "read_keys",
    "read_stats",
    "recode_store",
    "record_staged",
    "report_join",
    "sampled_covariance",
    "scalar_array",
    "sign_store",
    "stage_unit",
    "staged_units",
    "store_progress",
    "store_stats",
    "stored_views",
    "subset_store",
    "take_lock",
    "token_array",
    "unlock_store",
    "verify_store",
    "view_array",
    "withdraw_rows",
]
