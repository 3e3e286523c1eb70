"""`polymamba genomics generate`."""

from polymamba.genomics.alphabet import BOS, TOKEN_NAMES, A, T, tokenize
from polymamba.genomics.language_model import DNALanguageModel

CPU = ("--device", "cpu")


def test_generate(run, tmp_path, capsys, genomics):
    genomics("generate", run, "--prompt", "ACGTN", "--length", 70, "--number", 3, "--seed", 5, *CPU)
    text = capsys.readouterr().out
    records = dict(line.split("\n", 1) for line in text.split(">")[1:])
    assert list(records) == [f"generated_{i} 70 bases after 5" for i in (1, 2, 3)]
    written = [body.replace("\n", "") for body in records.values()]
    assert all(sequence[:5] == "ACGTN" and len(sequence) == 75 for sequence in written)
    assert set("".join(sequence[5:] for sequence in written)) == set("ACGT")
    assert len(set(written)) == 3
    (tmp_path / "p.fa").write_text(">one\nACGTN\n>two\nAC\n")
    genomics(
        "generate", run, "--prompts", tmp_path / "p.fa", "--length", 70, "--seed", 5, "-o", tmp_path / "o.fa", *CPU
    )
    again = (tmp_path / "o.fa").read_text().split(">")[1:]
    assert again[0].split("\n", 1)[1].replace("\n", "") == written[0], "the seed and the prompt decide"
    assert again[1].startswith("two_1 70 bases after 2\n")


def test_greedy_writing_is_what_the_model_finds_likeliest(run, capsys, log_p, genomics):
    genomics("generate", run, "--prompt", "ACG", "--length", 20, "--temperature", 0, *CPU)
    written = "".join(capsys.readouterr().out.splitlines()[1:])
    model = DNALanguageModel.from_pretrained(run)
    tokens = [BOS, *tokenize("ACG").tolist()]
    for _ in range(20):
        tokens.append(int(log_p(model, tokens)[-1, A : T + 1].argmax()) + A)
    assert written == "".join(TOKEN_NAMES[t] for t in tokens[1:])


def test_a_masked_model_does_not_write(masked_run, error):
    assert "a masked model, which sees both ways; generate needs" in error("generate", masked_run, *CPU)
    assert "--prompt: 'J' at position 1 is no DNA letter" in error("generate", masked_run, "--prompt", "J", *CPU)
