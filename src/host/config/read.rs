//! From the text of a host file to its keys: everything that is wrong with single keys, each at its line.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde::Deserialize as _;
use toml::de::{DeArray, DeTable, DeValue, Deserializer, Error};

use super::file::{HostFile, RDMA_KEYS, TABLES, TLS_KEYS, TOP_KEYS};
use super::network::NETWORK_KEYS;
use super::problem::Problem;

/// What a text says.
pub(super) struct Read {
    /// The keys whose values can be used.
    pub(super) file: HostFile,
    /// Where each key is: those of the top, and `tls.KEY` and `peers.NAME`.
    pub(super) lines: BTreeMap<String, usize>,
    /// What is wrong with the others.
    pub(super) problems: Vec<Problem>,
    /// The keys of the top that are among them.
    pub(super) spoilt: BTreeSet<String>,
}

/// Reads the text of a host file. A file that is not TOML has one problem, another one as many as it has wrong keys: each is
/// noted, taken out, and the rest read again.
pub(super) fn read(text: &str) -> Read {
    let mut read = Read {
        file: HostFile::default(),
        lines: BTreeMap::new(),
        problems: Vec::new(),
        spoilt: BTreeSet::new(),
    };
    let mut table = match DeTable::parse(text) {
        Ok(table) => table,
        Err(error) => {
            read.problems.push(not_toml(text, &error));
            // It may be there, further down.
            read.spoilt.insert("name".to_owned());
            return read;
        }
    };
    read.lines = lines(text, table.get_ref());
    loop {
        let error = match HostFile::deserialize(Deserializer::from(table.clone())) {
            Ok(file) => {
                read.file = file;
                return read;
            }
            Err(error) => error,
        };
        let span = error.span().unwrap_or_default();
        let keys = take_out(table.get_mut(), &span);
        read.problems.push(Problem { line: Some(line(text, span.start)), what: wrong(&keys, &error) });
        match keys.into_iter().next() {
            Some(key) => read.spoilt.insert(key),
            // It is at no key: nothing can be taken out, and so nothing more be found.
            None => return read,
        };
    }
}

/// The line that a byte of the text is in, from 1 on.
pub(super) fn line(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

fn lines(text: &str, table: &DeTable<'_>) -> BTreeMap<String, usize> {
    let mut lines = BTreeMap::new();
    for (key, value) in table {
        lines.insert(key.get_ref().to_string(), line(text, key.span().start));
        let below = TABLES.contains(&key.get_ref().as_ref()).then(|| value.get_ref().as_table()).flatten();
        for (below, _) in below.into_iter().flatten() {
            lines.insert(format!("{}.{}", key.get_ref(), below.get_ref()), line(text, below.span().start));
        }
    }
    lines
}

/// Takes out what the error is about, the innermost key of a table or a whole element of an array, and returns the keys that
/// lead there.
fn take_out(table: &mut DeTable<'_>, span: &Range<usize>) -> Vec<String> {
    let holds = |outer: Range<usize>| outer.start <= span.start && span.end <= outer.end;
    for (key, value) in table.iter_mut() {
        let within = value.span();
        let mut emptied = false;
        let mut keys = match value.get_mut() {
            DeValue::Table(inner) => take_out(inner, span),
            DeValue::Array(elements) => {
                let keys = take_element(elements, span);
                emptied = elements.is_empty();
                keys
            }
            _ => Vec::new(),
        };
        let here = keys.is_empty() && (holds(key.span()) || holds(within));
        if here || !keys.is_empty() {
            keys.retain(|key| !key.is_empty());
            let key = key.get_ref().to_string();
            // An array without its only element would be another problem.
            if here || emptied {
                table.remove(key.as_str());
            }
            keys.insert(0, key);
            return keys;
        }
    }
    Vec::new()
}

/// The same in an array; the keys are those within the element, or an empty one for the element itself.
fn take_element(elements: &mut DeArray<'_>, span: &Range<usize>) -> Vec<String> {
    let mut keys = Vec::new();
    let mut kept = DeArray::new();
    for mut element in std::mem::replace(elements, DeArray::new()) {
        if !keys.is_empty() {
            kept.push(element);
            continue;
        }
        let within = element.span();
        if let DeValue::Table(inner) = element.get_mut() {
            keys = take_out(inner, span);
        }
        if keys.is_empty() && within.start <= span.start && span.end <= within.end {
            keys.push(String::new());
        }
        if keys.is_empty() {
            kept.push(element);
        }
    }
    *elements = kept;
    keys
}

fn not_toml(text: &str, error: &Error) -> Problem {
    let span = error.span().unwrap_or_default();
    let written = text.get(span.clone()).unwrap_or_default().trim();
    let what = if error.message() == "duplicate key" {
        format!("{written} is there twice; take one out")
    } else if written.is_empty() || written.len() > 40 || written.contains('\n') {
        format!("not TOML: {}; write key = value, and texts in quotes", error.message())
    } else {
        format!("not TOML at {written}: {}; write key = value, and texts in quotes", error.message())
    };
    Problem { line: Some(line(text, span.start)), what }
}

/// What is wrong, with the key before it, where it is not the key itself.
fn wrong(keys: &[String], error: &Error) -> String {
    let message = error.message();
    if message.starts_with("unknown field") {
        return unknown(keys);
    }
    let mistaken = message.strip_prefix("invalid type: ").and_then(|rest| rest.split_once(", expected "));
    let what = match mistaken {
        Some((written, wanted)) => mistyped(written, wanted),
        None if message.ends_with("number overflowed") => {
            "the number is too large; write a smaller one".into()
        }
        None => message.to_owned(),
    };
    if keys.is_empty() { what } else { format!("{}: {what}", shown(keys)) }
}

/// Serde's words for a value of another type, in those of an administrator.
fn mistyped(written: &str, wanted: &str) -> String {
    let written = match written.split_once(' ') {
        Some(("string", text)) => text.to_owned(),
        _ if written == "sequence" => "an array".to_owned(),
        _ if written == "map" => "a table or a date".to_owned(),
        _ => match written.split('`').nth(1) {
            Some(value) => value.to_owned(),
            None => written.to_owned(),
        },
    };
    let wanted = match wanted {
        "a sequence" => "an array, like [\"10.77.1.0/24\", \"eth1\"]",
        "a map" => "a table, with a line like host-b = \"10.0.0.2\" for each host",
        other => other,
    };
    format!("{written} cannot be; write {wanted}")
}

/// Keys as TOML writes them.
fn shown(keys: &[String]) -> String {
    let bare = |key: &str| key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    let keys: Vec<String> =
        keys.iter().map(|key| if bare(key) { key.clone() } else { format!("{key:?}") }).collect();
    keys.join(".")
}

fn unknown(keys: &[String]) -> String {
    let Some((key, above)) = keys.split_last() else { return "an unknown key; take it out".to_owned() };
    let full = shown(keys);
    let known: Vec<&str> = match above.first().map(String::as_str) {
        None => TOP_KEYS.into_iter().chain(TABLES).collect(),
        Some("tls") => TLS_KEYS.into(),
        Some("rdma") => RDMA_KEYS.into(),
        Some(_) => NETWORK_KEYS.into(),
    };
    if let Some(near) = nearest(key, &known) {
        return format!("there is no key {full}; did you mean {near}?");
    }
    if !above.is_empty() && TOP_KEYS.contains(&key.as_str()) {
        return format!(
            "there is no key {full}; {key} belongs above the first line in brackets, since all keys below such a line are \
             part of it"
        );
    }
    if above.is_empty() {
        format!("there is no key {full}; `pageferry config init` writes a host file with every key")
    } else {
        format!("there is no key {full}; there are {}", known.join(", "))
    }
}

/// The known word that somebody may have meant: at most a third of the letters differ, or one is a part of the other.
fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let word = word.to_lowercase().replace('-', "_");
    let (apart, near) = known.iter().map(|known| (distance(&word, known), *known)).min()?;
    if apart <= near.len().max(word.len()) / 3 {
        return Some(near);
    }
    let part = |known: &&&str| word.len() >= 3 && (known.contains(&word) || word.contains(**known));
    known.iter().filter(part).max_by_key(|known| known.len().min(word.len())).copied()
}

/// How many letters have to be put in, taken out, changed or swapped with the next to make one of the other (optimal string
/// alignment).
fn distance(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    let first: Vec<usize> = (0..=other.len()).collect();
    let mut rows = vec![first];
    for (line, a) in one.iter().enumerate() {
        let above = &rows[line];
        let mut row = vec![line + 1];
        for (column, b) in other.iter().enumerate() {
            let changed = above[column] + usize::from(a != b);
            let mut least = changed.min(above[column + 1] + 1).min(row[column] + 1);
            if line > 0 && column > 0 && *a == other[column - 1] && one[line - 1] == *b {
                least = least.min(rows[line - 1][column - 1] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[one.len()][other.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn distances() {
        for (one, other, apart) in
            [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("ca", "ac", 1), ("prot", "port", 1)]
        {
            assert_eq!(distance(one, other), apart, "{one} {other}");
            assert_eq!(distance(other, one), apart, "{other} {one}");
        }
    }

    proptest! {
        /// Whatever somebody writes, it ends, and what it complains of is in the text.
        #[test]
        fn no_text_makes_it_panic(
            parts in proptest::collection::vec(
                prop_oneof![
                    "[a-z]{1,4} = [0-9a-z\"\\[\\]{}=,.]{0,12}\n",
                    Just("[tls]\n".to_owned()),
                    Just("[peers]\n".to_owned()),
                    Just("networks = [\"a\", { subnet = 1 }, {}, []]\n".to_owned()),
                    Just("peers.a = [1]\npeers.\"b c\" = \"10.0.0.1\"\n".to_owned()),
                    Just("tls.ca = 1\ntls.x.y = 2\n".to_owned()),
                    Just("[[networks]]\ncap = 1\n".to_owned()),
                    "\\PC{0,20}",
                ],
                0..6,
            )
        ) {
            let text = parts.concat();
            let last = text.lines().count().max(1) + 1;
            for problem in read(&text).problems {
                prop_assert!(problem.line.is_some_and(|line| line <= last), "{problem:?} in {text:?}");
            }
        }
    }
}
