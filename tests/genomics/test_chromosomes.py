"""Names of chromosomes: which of the genome's are meant by those that others use."""

import pytest

from polymamba.core.errors import InputError
from polymamba.genomics.reading.chromosomes import match_names


@pytest.mark.parametrize(
    ("wanted", "known", "match"),
    [
        ("chr1", ["1", "10", "11"], "1"),
        ("1", ["chr1", "chr10", "chr11"], "chr1"),
        ("1", ["Chr1", "Chr2"], "Chr1"),
        ("chr1", ["chr01", "chr10"], "chr01"),
        ("chr10", ["chr01", "chr10"], "chr10"),
        ("Chr02", ["chromosome_1", "chromosome_2"], "chromosome_2"),
        ("chromosome_3", ["3", "chr33"], "3"),
        ("chrM", ["MT", "chr1"], "MT"),
        ("MT", ["chrM", "chr1"], "chrM"),
        ("M", ["chrMT"], "chrMT"),
        ("x", ["chrX", "chrY"], "chrX"),
        ("2L", ["chr2L", "chr2R"], "chr2L"),
        ("scaffold10", ["scaffold1", "scaffold10"], "scaffold10"),
        ("chr01", ["Umaydis:chr01:1:+:2476500", "Umaydis:chr02:1:+:1879391"], "Umaydis:chr01:1:+:2476500"),
        ("2", ["Umaydis:chr01:2:+:2476500", "Umaydis:chr02:1:+:1879391"], "Umaydis:chr02:1:+:1879391"),
        ("chr1", ["NC_000001.11|chr1", "NC_000010.11|chr10"], "NC_000001.11|chr1"),
        ("NC_000010.11", ["NC_000001.11|chr1", "NC_000010.11|chr10"], "NC_000010.11|chr10"),
        # An equal name goes first, whatever else would do.
        ("chr1", ["1", "chr1", "Chr1", "x|chr1"], "chr1"),
        ("chrM", ["chrM", "chrMT"], "chrM"),
        ("a:chr1", ["a:chr1", "chr1"], "a:chr1"),
    ],
)
def test_names_that_match(wanted, known, match):
    for order in (known, known[::-1]):
        assert match_names({wanted: "x.bed, line 7"}, order) == {wanted: match}


@pytest.mark.parametrize(
    ("wanted", "known", "both"),
    [
        ("chr1", ["1", "chr01"], "'1' or 'chr01'"),
        ("MT", ["chrM", "chrMT"], "'chrM' or 'chrMT'"),
        ("chr1", ["1", "x|chr1"], "'1' or 'x|chr1'"),
        ("chr1", ["Umaydis:chr01:1", "Ztritici:chr01:1"], "'Umaydis:chr01:1' or 'Ztritici:chr01:1'"),
        ("chrx", ["chrX", "X"], "'X' or 'chrX'"),
    ],
)
def test_names_that_may_mean_two(wanted, known, both):
    for order in (known, known[::-1]):
        with pytest.raises(InputError) as error:
            match_names({wanted: "x.bed, line 7"}, order)
        message = f"x.bed, line 7: chromosome {wanted!r} may mean {both} of the genome; use the genome's own name"
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("wanted", "known", "has"),
    [
        ("chr9", [f"chr{i}" for i in range(1, 9)], "chr1, chr2, chr3, chr4, chr5 and 3 more"),
        ("chr1", ["chr10", "chr11"], "chr10, chr11"),
        ("1", ["a:chr2:1:+:9"], "a:chr2:1:+:9"),  # 1 is a position there
        ("scaffold11", ["scaffold101"], "scaffold101"),
        ("x1", ["xchr1"], "xchr1"),
        ("a:chr1", ["b:chr1", "chr1"], "b:chr1, chr1"),  # of another species, for all we know
    ],
)
def test_names_that_are_not_there(wanted, known, has):
    with pytest.raises(InputError) as error:
        match_names({wanted: "x.bed, line 7"}, known)
    assert str(error.value) == f"x.bed, line 7: chromosome {wanted!r} is not in the genome, which has {has}"
