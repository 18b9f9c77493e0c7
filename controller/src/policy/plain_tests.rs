//! The plain reader beside the YAML parser.

use super::*;

const POLICIES: [&str; 7] = [
    include_str!("../../../examples/loadbalancer.yaml"),
    include_str!("../../../examples/minimal.yaml"),
    include_str!("../../../examples/quickstart.yaml"),
    include_str!("../../../examples/two-networks.yaml"),
    include_str!("../../../tests/tests/policies/both-families.yaml"),
    include_str!("../../../tests/tests/policies/explain.yaml"),
    include_str!("../../../tests/tests/policies/groups.yaml"),
];

/// The same values at the same places. A block collection has no place of its own: its first scalar's is compared.
fn same(a: &Node<'_>, b: &Node<'_>) -> bool {
    a.head() == b.head()
        && match (&a.value, &b.value) {
            (Value::Null, Value::Null) => true,
            (Value::Bare(a), Value::Bare(b)) => a == b,
            (Value::Text(a), Value::Text(b)) => a == b,
            (Value::List(a), Value::List(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
            }
            (Value::Map(a), Value::Map(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|((k, v), (l, w))| same(k, l) && same(v, w))
            }
            _ => false,
        }
}

/// Is it read here? If so, the parser has to agree.
fn taken(text: &str) -> bool {
    let Some(own) = read(text) else { return false };
    match tree::parse(text) {
        Ok(parsed) => assert!(same(&own, &parsed), "{text:?}\n{own:?}\n{parsed:?}"),
        Err(error) => panic!("the parser refuses {text:?}: {error}"),
    }
    true
}

#[test]
fn policies_are_read_plainly_and_as_the_parser_reads_them() {
    let read = POLICIES.iter().filter(|text| taken(text)).count();
    assert!(read >= 5, "only {read} of {} policies are plain", POLICIES.len());
    for text in [
        "a: 1\nb:\n  - x\n  - { c: 'd', e: [1, \"two\"] } # f\ng:\nh:\n- i: j\n  k: 02:00:00:00:00:01\n-  l:\n    m: {}\n",
        "\n# c\n\n  a: b c\n  d: [e,\n    f,\n   ]",
        "n: ~\no: NO\np: 1_000\nq: 0x10\nr: 80-95\ns: 10.0.1.4/32\nt: fd00::1\nu: 1.5\nv: -5\nw: 1.2.3.4\nx: [007]\n",
    ] {
        assert!(taken(text), "{text:?}");
    }
}

#[test]
fn what_is_more_than_plain_is_left_to_the_parser() {
    for text in [
        "",
        "a",
        "a: &b c",
        "a: *b",
        "a: !t b",
        "a: |\n b",
        "a: >\n b",
        "a: b\n  c",
        "a: 'b''c'",
        "a: \"\\n\"",
        "a: 'b\n  c'",
        "--- \na: b",
        "a: b\n...",
        "%YAML 1.2\n",
        "a: b: c",
        "a: - b",
        "a:\tb",
        "a: b\r\n",
        "a: ü",
        "'a': b",
        "? a\n: b",
        "a b: c",
        "- - a",
        "-\n  a: b",
        "a: [b\n]",
        "a: {b}",
        "a: {b: }",
        "a: [b: c]",
        "a: {b:c}",
        "a: [b # c\n ]",
        "a: [b",
        "a: b\n c: d",
        " a: b\nc: d",
        "- a\nb: c",
        "a: @b",
        "a: - ",
        "- ---",
        "a: [::]",
    ] {
        assert!(read(text).is_none(), "{text:?}");
    }
    let deep = format!("{}{}", "[".repeat(40), "]".repeat(40));
    assert!(read(&format!("a: {deep}\n")).is_none());
}

#[test]
fn whatever_is_read_plainly_the_parser_reads_alike() {
    const PARTS: [&str; 54] = [
        "a: b\n",
        "- ",
        "  ",
        "\n",
        ": ",
        ":",
        "#",
        " #c",
        "'",
        "\"",
        "[",
        "]",
        "{",
        "}",
        ",",
        ", ",
        "x",
        "10",
        "0x1",
        "~",
        "null",
        "-",
        "*",
        "&a ",
        "?",
        "|",
        "k:\n",
        "- x\n",
        "- k: v\n",
        "  k: v\n",
        "    - z\n",
        "{a: 1, b: [c, 'd']}",
        "[a,\n b]",
        "y",
        "1.5",
        "true",
        "'q'",
        "a b",
        "{}",
        "[]",
        "  - {a: b}\n",
        "k: [\n",
        "  ]\n",
        "%",
        "---\n",
        "...\n",
        "!t ",
        "@",
        "`",
        ">",
        "a:b",
        "::1",
        "fd::/8",
        "\\",
    ];
    let mut state = 88_172_645_463_325_252u64;
    let mut below = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as usize % n
    };
    let mut read = 0;
    for _ in 0..20_000 {
        let text = if below(3) == 0 {
            // ASCII, so that it can be cut anywhere.
            let whole = POLICIES[1 + below(2)].replace(|c: char| !c.is_ascii(), "");
            let mut text = whole[..whole.len().min(1500)].to_owned();
            for _ in 0..=below(3) {
                let (at, part) = (below(text.len()), PARTS[below(PARTS.len())]);
                let end = at + below(3).min(text.len() - at);
                text.replace_range(at..end, part);
            }
            text
        } else {
            (0..=below(14)).map(|_| PARTS[below(PARTS.len())]).collect()
        };
        read += usize::from(taken(&text));
    }
    assert!(read > 400, "{read} of 20,000 texts are plain");
}
