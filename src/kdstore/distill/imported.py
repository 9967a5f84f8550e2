"""What a run refuses of imported stores, which do not say all of their teachers, until the user says that it is meant.

A logit scale that is unknown needs no rule of its own: losses that read one ask for it wherever a store has none.
"""

from __future__ import annotations

from collections.abc import Sequence

from kdstore.distill.config import DistillConfig
from kdstore.distill.losses import parse_loss, terms_of
from kdstore.errors import ConfigError, MissingFeature
from kdstore.store import Store


def check_imported(config: DistillConfig, stores: Sequence[Store], needs: Sequence[str]) -> None:
    """Refuse losses of logits that were perhaps trained otherwise (ConfigError), and targets of views that the student is not shown (MissingFeature)."""
    families = {term.family: name for name, term in terms_of(parse_loss(config.loss)).items() if term.family}
    for store in stores:
        if families and config.sigmoid_teacher != "allow" and "logit_bias" in store.identity["teacher"].get("unknown", []):
            family, name = next(iter(families.items()))
            raise ConfigError(
                f"{store.path} does not say whether its teacher was trained with a softmax or a sigmoid, and {name} takes a {family} of its logits.",
                'Import it again with --logit-bias, or set sigmoid_teacher="allow".',
            )
        for array in needs:
            encoding = store.identity.get("arrays", {}).get(array, {})
            if encoding.get("views") == ["augmented"] and config.views != "unmatched":
                raise MissingFeature(
                    f"{array} of {store.path} is of augmented views ({encoding.get('augmentation')}) that cannot be drawn again for the student.",
                    "Choose a loss of the texts alone, or take them for targets of the plain view: --set views=unmatched.",
                )
