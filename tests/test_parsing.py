"""Answers as people get them from models, and which option each one chooses."""

import random

import pytest

from apollo.eval.parsing import Parsed, parse_answer

BALLS = ("the blue ball", "the red ball", "a green cube", "nothing")
COLOURS = ("red", "dark red", "blue", "green")
CATS = ("dog", "cat", "bird", "fish")
NUMBERS = ("3", "1", "2", "5")
YES_NO = ("yes", "no")
LETTERS = ("B", "A", "C", "D")
TEAMS = ("Team B wins", "Team A wins", "Neither wins", "A draw")
NONE = ("a car", "a bus", "a train", "None of the above")
CODE = ("C++", "C#", "Java", "Rust")
NINE = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHINESE = ("红色的球", "蓝色的球", "绿色的球", "没有球")

# (what was written, options, index of the option chosen or why there is none)
CASES = [
    # a letter, however dressed
    ("A", BALLS, 0),
    ("B", BALLS, 1),
    ("b", BALLS, 1),
    ("(B)", BALLS, 1),
    ("(b)", BALLS, 1),
    ("b)", BALLS, 1),
    ("C.", BALLS, 2),
    ("c.", BALLS, 2),
    (" D\n", BALLS, 3),
    ("[B]", BALLS, 1),
    ("'B'", BALLS, 1),
    ('"B."', BALLS, 1),
    ("**D**", BALLS, 3),
    ("**B.** the red ball", BALLS, 1),
    ("__B__", BALLS, 1),
    ("`C`", BALLS, 2),
    ("B</s>", BALLS, 1),
    ("B<|im_end|>", BALLS, 1),
    ("Ｂ", BALLS, 1),
    ("（Ｃ）", BALLS, 2),
    ("B。", BALLS, 1),
    ("Option B", BALLS, 1),
    ("option b", BALLS, 1),
    ("Option A shows it best", BALLS, 0),
    ("Option 2", BALLS, 1),
    ("Choice C", BALLS, 2),
    ("I", NINE, 8),
    # a letter and a text
    ("B) the red ball", BALLS, 1),
    ("B. The red ball.", BALLS, 1),
    ("B: red ball", BALLS, 1),
    ("B - the red ball", BALLS, 1),
    ("B the red ball", BALLS, 1),
    ("(B) something else altogether", BALLS, 1),
    ("B, because A is wrong", BALLS, 1),
    ("B\n\nThe red ball enters from the left while a cube rests.", BALLS, 1),
    ("B. the blue ball", BALLS, "ambiguous"),
    ("A. the red ball", BALLS, "ambiguous"),
    ("B. dark red", COLOURS, 1),
    ("B. red", COLOURS, "ambiguous"),
    # an option's text
    ("the red ball", BALLS, 1),
    ("The Red Ball!", BALLS, 1),
    ("red ball", BALLS, 1),
    ("A red ball", BALLS, 1),
    ("It is the red ball.", BALLS, 1),
    ("The object is a green cube on a table.", BALLS, 2),
    ("Nothing.", BALLS, 3),
    ("dark red", COLOURS, 1),
    ("The car is dark red.", COLOURS, 1),
    ("red", COLOURS, 0),
    ("It is red, not dark red.", COLOURS, 0),
    ("Red and blue.", COLOURS, "ambiguous"),
    ("red, green, and blue", COLOURS, "ambiguous"),
    ("It could be dark red or green", COLOURS, "ambiguous"),
    ("Red. The blue one leaves before.", COLOURS, 0),
    ("reddish", COLOURS, "unparsable"),
    # the article A, the pronoun I, and other capitals
    ("A cat is on the left", CATS, 1),
    ("A dog", CATS, 0),
    ("Answer: A cat", CATS, 1),
    ("A. cat", CATS, "ambiguous"),
    ("A man is walking.", CATS, "unparsable"),
    ("A is right", CATS, 0),
    ("A\nThe dog barks", CATS, 0),
    ("I think it is a bird", CATS, 2),
    ("I see three of them", NINE, 2),
    ("A man in a T-shirt from Washington D.C. holds a fish at 20 °C", CATS, 3),
    # statements
    ("Answer: B", BALLS, 1),
    ("answer:b", BALLS, 1),
    ("Answer:\nB", BALLS, 1),
    ("**Answer:** (B)", BALLS, 1),
    ("The answer is (C).", BALLS, 2),
    ("The answer is C, since the cube is green.", BALLS, 2),
    ("The best answer is: D. the red ball", ("x", "y", "z", "the red ball"), 3),
    ("The best answer is: D. the red ball", BALLS, "ambiguous"),
    ("The correct option is B.", BALLS, 1),
    ("My final answer would be option C", BALLS, 2),
    ("The answer is the red ball, which the blue ball hides.", BALLS, "ambiguous"),
    ("The blue ball comes first. So the answer is the red ball.", BALLS, 1),
    ("The answer to what moves, as I see it, is: the red ball", BALLS, 1),
    ("B is the correct answer, as A shows a cube.", BALLS, 1),
    ("Option C is correct. Option A is not.", BALLS, 2),
    ("$\\boxed{C}$", BALLS, 2),
    ("\\boxed{\\text{B}}", BALLS, 1),
    ("Thus \\boxed{B. the red ball}", BALLS, 1),
    ("<answer>B</answer>", BALLS, 1),
    ("<answer>\nB\n</answer> because it is C", BALLS, 1),
    ('{"answer": "B"}', BALLS, 1),
    ("I would choose C over A", BALLS, 2),
    ("答案是B。", BALLS, 1),
    ("答案：Ｃ", BALLS, 2),
    ("我选D", BALLS, 3),
    ("La réponse est B.", BALLS, 1),
    ("Antwort: C", BALLS, 2),
    # reasoning before, and changes of mind
    ("A shows a cube, B a ball; C fits neither.\n\nAnswer: C", BALLS, 2),
    ("Answer: A? The ball is red, though.\nAnswer: B", BALLS, 1),
    ("The ball is blue in A and red in B, so B", BALLS, 1),
    ("I think A... no, B", BALLS, 1),
    ("The blue ball? No, the red ball.", BALLS, 1),
    ("Looking at A and then at C, neither holds.\n\nD", BALLS, 3),
    ("<think>A? B? The answer is A.</think>C", BALLS, 2),
    ("The answer is A, hmm.</think>\n\nC", BALLS, 2),
    ("<think>The answer is A, but let me", BALLS, "unparsable"),
    ("<think>It is A.</think>", BALLS, "unparsable"),
    ("Eliminating A and D leaves B and C; C fits better so C.", BALLS, 2),
    ("A. a ball: not shown.\nB. another: not shown.\n\nSo the correct answer is C.", BALLS, 2),
    ("The answer is the one with the red ball (B).", BALLS, 1),
    # several, denied, none
    ("Q: what moves? A: the red ball", BALLS, "ambiguous"),
    ("A: B", BALLS, "ambiguous"),
    ("My answer is between A and B but I lean towards B", BALLS, "ambiguous"),
    ("Definitely not B. C.", BALLS, 2),
    ("The answer cannot be determined from the video.", BALLS, "unparsable"),
    ("The correct answer is not given.", BALLS, "unparsable"),
    ("A and B", BALLS, "ambiguous"),
    ("A, B", BALLS, "ambiguous"),
    ("A B", BALLS, "ambiguous"),
    ("A, B, and D", BALLS, "ambiguous"),
    ("A/B", BALLS, "ambiguous"),
    ("Answer: A or C", BALLS, "ambiguous"),
    ("A. the blue ball\nB. the red ball\nC. a green cube\nD. nothing", BALLS, "ambiguous"),
    ("not A", BALLS, "unparsable"),
    ("Not A but B", BALLS, 1),
    ("The answer is not A", BALLS, "unparsable"),
    ("A is wrong and C is incorrect. B remains.", BALLS, 1),
    ("Neither A nor B; it must be (D)", BALLS, 3),
    ("It isn't the blue ball, it's the red ball", BALLS, 1),
    ("red rather than blue", COLOURS, 0),
    ("F", BALLS, "unparsable"),
    ("The answer is F.", BALLS, "unparsable"),
    ("Answer: E. None of the above", BALLS, "unparsable"),
    ("None of the above", BALLS, "unparsable"),
    ("None of the above.", NONE, 3),
    ("D. None of the above", NONE, 3),
    ("", BALLS, "empty"),
    (" \n\t", BALLS, "empty"),
    ("...", BALLS, "unparsable"),
    ("I'm sorry, I cannot determine whether it is the red ball.", BALLS, "unparsable"),
    ("I can't tell for sure, but it looks like the red ball", BALLS, 1),
    ("As an AI, I am unable to watch videos", BALLS, "unparsable"),
    ("assistant", BALLS, "unparsable"),
    # yes and no
    ("Yes, it does", YES_NO, 0),
    ("No.", YES_NO, 1),
    ("YES", YES_NO, 0),
    ("No, it is red, yes, but it rests", YES_NO, 1),
    ("Hm, no, so yes", YES_NO, 0),
    ("Yes, there is no doubt", YES_NO, 0),
    ("The ball does not move.", YES_NO, "unparsable"),
    ("There is no ball", YES_NO, 1),
    ("A", YES_NO, 0),
    ("B. no", YES_NO, 1),
    ("B. yes", YES_NO, "ambiguous"),
    ("Yes.", ("No, it stays", "Yes, it moves"), 1),
    ("No, a man enters", ("No one", "a man", "a dog"), 1),
    # numbers, letters and names as options
    ("3", NUMBERS, 0),
    ("2.", NUMBERS, 2),
    ("There are 5 of them.", NUMBERS, 3),
    ("C", NUMBERS, 2),
    ("Option 2", NUMBERS, "ambiguous"),
    ("4", NUMBERS, "unparsable"),
    ("2", BALLS, "unparsable"),
    ("at 3:15", NUMBERS, "unparsable"),
    ("-5", ("5", "-5"), 1),
    ("A", LETTERS, "ambiguous"),
    ("(A) B", LETTERS, 0),
    ("C", LETTERS, 2),
    ("I see that Team B wins.", TEAMS, 0),
    ("B. Team A wins", TEAMS, 1),
    ("C. Both A and B", ("A", "B", "Both A and B", "none"), 2),
    ("Both A and B", ("x", "y", "Both A and B", "none"), 2),
    ("C++", CODE, 0),
    ("A. C++", CODE, 0),
    ("Answer: C#", CODE, 1),
    ("D", CODE, 3),
    ("红色的球", CHINESE, 0),
    ("这是蓝色的球。", CHINESE, 1),
    ("B。蓝色的球", CHINESE, 1),
]


@pytest.mark.parametrize(
    ("text", "options", "expected"), CASES, ids=[repr(case[0])[:60] for case in CASES]
)
def test_what_an_answer_chooses(text, options, expected):
    if isinstance(expected, str):
        assert parse_answer(text, options) == Parsed(None, expected)
    else:
        assert parse_answer(text, options) == Parsed(expected, "ok")


def test_there_are_many_cases_and_no_doubles():
    assert len(CASES) == len({case[:2] for case in CASES}) >= 80


@pytest.mark.parametrize("options", [BALLS, COLOURS, CATS, NUMBERS, YES_NO, NONE, CODE, CHINESE])
def test_every_option_is_read_however_it_is_given(options):
    for index, option in enumerate(options):
        letter = "ABCD"[index]
        for text in (letter, option, f"{letter}. {option}", f"({letter})", f"Answer: {letter}"):
            assert parse_answer(text, options) == Parsed(index, "ok"), text
        upper = option.upper() + "."
        assert parse_answer(upper, options) == Parsed(index, "ok"), upper


def test_hostile_text_never_crashes():
    rng = random.Random(0)
    pieces = ["A", "B", "(", ")", " ", "\n", "not ", "answer", " is ", "red", "<think>", "</think>"]
    pieces += [
        "\\boxed{",
        "}",
        "1",
        "-",
        ".",
        ",",
        "option ",
        "²",
        "é",
        "\x00",
        "球",
        "`",
        "*",
        "no",
    ]
    for _ in range(600):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 25)))
        for options in (COLOURS, YES_NO, NUMBERS, CODE):
            parsed = parse_answer(text, options)
            assert parsed == parse_answer(text, options)
            assert (parsed.prediction is not None) == (parsed.status == "ok")
            assert parsed.prediction is None or 0 <= parsed.prediction < len(options)
    for piece in (*pieces, "answer is not ", "so ", "A and "):
        parse_answer(piece * 1000, COLOURS)
