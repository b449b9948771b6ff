"""The arrays that a call's functions read have an element for each of its scores."""

import numpy as np
import pytest

from numflash import masks
from numflash.problem.block_masks import names_of_aux
from numflash.problem.options import AttentionOptions
from numflash.problem.programs import Extent, program_of, program_of_mask
from numflash.runtime.views import fresh

EXTENT = Extent(2, 3, 5, 9, -1)


def of_call(extent=EXTENT, n=9):
    views = {"aux0": fresh((n,), "int32", -1)}
    options = AttentionOptions(mask_mod=masks.document, aux=(np.zeros(n, np.int32),))
    return program_of(views, options, extent)


def of_mask(extent=EXTENT, n=9):
    aux = (np.zeros(n, np.int32),)
    views = {name: fresh((n,), "int32", -1) for name in names_of_aux(aux)}
    return program_of_mask(masks.document, aux, views, extent)


@pytest.mark.parametrize("of", [of_call, of_mask])
def test_an_array_that_is_too_small_is_refused(of):
    assert of()[0] == f"1;int32[1{'p' if of is of_call else 'u'}];keep=eq(aux0[j],aux0[i])"
    with pytest.raises(ValueError, match=r"indexed by the key's number.*at least 9.*got shape"):
        of(n=8)
    # A part of a larger problem reads where that has its places.
    with pytest.raises(ValueError, match="the key's number and must have at least 13 elements"):
        of(EXTENT._replace(origin=(0, 4, 0)))
    with pytest.raises(ValueError, match="the query's number and must have at least 14 elements"):
        of(EXTENT._replace(origin=(9, 4, 0)), n=13)
    # Nothing is read.
    of(EXTENT._replace(seqlen_q=0), n=1)
