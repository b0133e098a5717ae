//! A source file as the rules see it: the paths that it names and the words that it uses, outside test code.

use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, Group, Ident, TokenStream, TokenTree};

/// Every `.rs` file below a folder.
pub(crate) fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a source folder can be listed") {
        let path = entry.expect("a source folder can be listed").path();
        if path.is_dir() {
            walk(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
}

/// One file.
pub(crate) struct Source {
    /// Relative to the repository, like `src/sys/mod.rs`.
    pub(crate) name: String,
    /// The whole text.
    pub(crate) text: String,
    /// Every path of two or more segments outside test code, `use` groups taken apart, `super` resolved; with its line.
    pub(crate) paths: Vec<(Vec<String>, usize)>,
    /// Every identifier, in test code too; with its line.
    pub(crate) words: Vec<(String, usize)>,
    /// The module that it is, from the crate's root.
    module: Vec<String>,
    /// The modules in other files that it declares for tests only.
    test_modules: Vec<Vec<String>>,
}

impl Source {
    pub(crate) fn parse(name: &str, text: &str) -> Self {
        let tokens: TokenStream = text.parse().expect("a source file that compiles has tokens");
        let module = module_of(name);
        let mut reader = Reader::default();
        reader.all_words(tokens.clone());
        if !is_test_file(name) {
            reader.items(tokens, &module);
        }
        let Reader { paths, words, test_modules } = reader;
        Self { name: name.to_owned(), text: text.to_owned(), paths, words, module, test_modules }
    }

    /// Forgets the paths of files that others declare as `#[cfg(test)] mod name;`.
    pub(crate) fn exempt_test_modules(sources: &mut [Self]) {
        let tests: Vec<Vec<String>> = sources.iter().flat_map(|source| source.test_modules.clone()).collect();
        for source in sources {
            if tests.iter().any(|test| source.module.starts_with(test)) {
                source.paths.clear();
            }
        }
    }

    /// Whether the file's name says that it is test code.
    pub(crate) fn is_test(&self) -> bool {
        is_test_file(&self.name)
    }

    /// The layer that the file belongs to: the first part of its path, without `.rs`.
    pub(crate) fn layer(&self) -> &str {
        let inside = self.name.strip_prefix("src/").unwrap_or(&self.name);
        inside.split('/').next().map_or(inside, |first| first.strip_suffix(".rs").unwrap_or(first))
    }
}

fn is_test_file(name: &str) -> bool {
    name.ends_with("/tests.rs") || name.contains("/tests/")
}

/// The module that a file is, from the crate's root: `src/a/b.rs` and `src/a/b/mod.rs` are `[a, b]`.
fn module_of(name: &str) -> Vec<String> {
    let inside = name.trim_start_matches("src/").trim_end_matches(".rs");
    let parts = inside.split('/').filter(|part| !["mod", "lib", "main"].contains(part));
    parts.map(str::to_owned).collect()
}

#[derive(Default)]
struct Reader {
    paths: Vec<(Vec<String>, usize)>,
    words: Vec<(String, usize)>,
    test_modules: Vec<Vec<String>>,
}

impl Reader {
    fn all_words(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Ident(word) => self.words.push((word.to_string(), word.span().start().line)),
                TokenTree::Group(group) => self.all_words(group.stream()),
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
        }
    }

    /// Reads tokens that stand in `module`, without the items that are compiled for tests only.
    fn items(&mut self, tokens: TokenStream, module: &[String]) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            if let Some(attribute) = attribute(&tokens[at..]) {
                let inner = is_punct(tokens.get(at + 1), '!');
                at += if inner { 3 } else { 2 };
                if is_test_only(attribute) {
                    if inner {
                        return;
                    }
                    let length = item_length(&tokens[at..]);
                    self.test_modules.extend(declared_module(&tokens[at..at + length], module));
                    at += length;
                }
                continue;
            }
            if let Some((name, body)) = inline_module(&tokens[at..]) {
                let mut inside = module.to_vec();
                inside.push(name);
                self.items(body.stream(), &inside);
                at += 3;
                continue;
            }
            match &tokens[at] {
                TokenTree::Ident(first) if !may_precede_path(first) && is_separator(&tokens[at + 1..]) => {
                    let line = first.span().start().line;
                    at += self.path(vec![first.to_string()], &tokens[at + 1..], module, line) + 1;
                }
                TokenTree::Group(group) => {
                    self.items(group.stream(), module);
                    at += 1;
                }
                _ => at += 1,
            }
        }
    }

    /// Reads what follows the beginning of a path; answers how many tokens that was.
    fn path(&mut self, mut path: Vec<String>, rest: &[TokenTree], module: &[String], line: usize) -> usize {
        let mut at = 0;
        while is_separator(&rest[at..]) {
            match rest.get(at + 2) {
                Some(TokenTree::Ident(word)) => path.push(word.to_string()),
                Some(TokenTree::Punct(star)) if star.as_char() == '*' => path.push("*".to_owned()),
                Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                    self.branches(&path, group, module, line);
                    return at + 3;
                }
                // `Vec::<u8>`: generic arguments are read as tokens of their own.
                _ => {
                    at += 2;
                    break;
                }
            }
            at += 3;
        }
        self.paths.push((resolved(path, module), line));
        at
    }

    /// Reads `{a::b, c}` behind a path.
    fn branches(&mut self, path: &[String], group: &Group, module: &[String], line: usize) {
        let tokens: Vec<TokenTree> = group.stream().into_iter().collect();
        for branch in tokens.split(|token| is_punct(Some(token), ',')) {
            let mut whole = path.to_vec();
            match branch.first() {
                Some(TokenTree::Ident(word)) if word != "self" => whole.push(word.to_string()),
                Some(TokenTree::Punct(star)) if star.as_char() == '*' => whole.push("*".to_owned()),
                _ => {}
            }
            self.path(whole, branch.get(1..).unwrap_or_default(), module, line);
        }
    }
}

/// The path from the crate's root, where it begins with `self` or `super`.
fn resolved(path: Vec<String>, module: &[String]) -> Vec<String> {
    let supers = path.iter().take_while(|part| *part == "super").count();
    if supers == 0 && path[0] != "self" {
        return path;
    }
    let skipped = if supers == 0 { 1 } else { supers };
    let parent = &module[..module.len().saturating_sub(supers)];
    let root = std::iter::once("crate".to_owned());
    root.chain(parent.iter().cloned()).chain(path.into_iter().skip(skipped)).collect()
}

fn is_punct(token: Option<&TokenTree>, sign: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == sign)
}

/// Whether a word is a keyword, behind which `::std` is a path of its own.
fn may_precede_path(word: &Ident) -> bool {
    let keywords =
        ["use", "return", "in", "as", "mut", "dyn", "impl", "for", "if", "match", "else", "move", "where"];
    keywords.iter().any(|keyword| word == keyword)
}

/// Whether the tokens begin with `::`.
fn is_separator(tokens: &[TokenTree]) -> bool {
    is_punct(tokens.first(), ':') && is_punct(tokens.get(1), ':')
}

/// The brackets of `#[...]` or `#![...]` at the beginning.
fn attribute(tokens: &[TokenTree]) -> Option<&Group> {
    if !is_punct(tokens.first(), '#') {
        return None;
    }
    let at = if is_punct(tokens.get(1), '!') { 2 } else { 1 };
    match tokens.get(at) {
        Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Bracket => Some(group),
        _ => None,
    }
}

/// Whether an attribute is `cfg(test)` or `cfg(all(test, ...))`.
fn is_test_only(attribute: &Group) -> bool {
    let text: String = attribute.stream().to_string().split_whitespace().collect();
    text == "cfg(test)" || text.starts_with("cfg(all(test,")
}

/// `mod name { ... }` at the beginning.
fn inline_module(tokens: &[TokenTree]) -> Option<(String, &Group)> {
    match tokens {
        [TokenTree::Ident(word), TokenTree::Ident(name), TokenTree::Group(body), ..]
            if word == "mod" && body.delimiter() == Delimiter::Brace =>
        {
            Some((name.to_string(), body))
        }
        _ => None,
    }
}

/// The module that an item `mod name;` declares, whatever attributes and visibility it has.
fn declared_module(item: &[TokenTree], module: &[String]) -> Option<Vec<String>> {
    match item {
        [.., TokenTree::Ident(word), TokenTree::Ident(name), end]
            if word == "mod" && is_punct(Some(end), ';') =>
        {
            Some(module.iter().cloned().chain([name.to_string()]).collect())
        }
        _ => None,
    }
}

/// How many tokens the item at the beginning has: up to its semicolon or its body.
fn item_length(tokens: &[TokenTree]) -> usize {
    let is_use = matches!(tokens.first(), Some(TokenTree::Ident(word)) if word == "use");
    let ends = |token: &TokenTree| match token {
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace && !is_use,
        other => is_punct(Some(other), ';'),
    };
    tokens.iter().position(ends).map_or(tokens.len(), |position| position + 1)
}
