//! What programs and people get to see: exit codes, JSON, messages, the API on its socket.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Command;

use serde_json::Value;

use crate::ask::{list, moved, said};
use crate::lab::{Host, Lab, is_here};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pageferry");

/// A request to a daemon's socket; answers the status, the headers and the body.
#[track_caller]
fn http(host: &Host, method: &str, path: &str, body: &str) -> (u16, String, String) {
    let mut socket = UnixStream::connect(host.config().with_file_name("socket")).expect("the daemon listens");
    let length = body.len();
    write!(
        socket,
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
    .expect("the request is sent");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("it answers");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no status: {head:?}")), head.to_lowercase(), body.to_owned())
}

/// A command with `--json` prints one value on stdout; where it succeeds, it is silent elsewhere.
#[track_caller]
fn one_value(host: &Host, words: &str, code: i32) -> Value {
    let (ended, stdout, stderr) = said(&host.run(&format!("{words} --json")));
    assert_eq!(ended, code, "{words}: {stdout}{stderr}");
    let mut values = serde_json::Deserializer::from_str(&stdout).into_iter::<Value>();
    let value = values.next().unwrap_or_else(|| panic!("{words}: nothing on stdout; {stderr}"));
    let value = value.unwrap_or_else(|error| panic!("{words}: {error}: {stdout:?}"));
    assert!(values.next().is_none(), "{words}: more than one value: {stdout}");
    if code == 0 {
        assert_eq!(stderr, "", "{words}");
    }
    value
}

/// A command that fails says why in one line on stderr.
#[track_caller]
fn one_line(host: &Host, words: &str, contains: &str) {
    let (code, stdout, stderr) = said(&host.run(words));
    assert_eq!((code, stdout.as_str()), (1, ""), "{words}: {stderr}");
    assert!(stderr.lines().count() == 1 && stderr.contains(contains), "{words}: {stderr:?}");
}

#[test]
fn every_command_answers_programs_and_people() {
    if !is_here() {
        return;
    }
    let mut lab = Lab::up("--rate none");
    let alpha = &lab.alpha;
    for words in
        ["host", "guest list", "guest show vm", "migrate vm --to beta", "status", "cancel x", "history"]
    {
        one_line(alpha, words, "no daemon answers at");
        let value = one_value(alpha, words, 1);
        assert!(
            value["error"].as_str().is_some_and(|error| error.contains("no daemon answers")),
            "{value:#}"
        );
    }
    one_line(alpha, "host --config /nowhere/host.toml", "/nowhere/host.toml: there is no such host file");
    one_value(alpha, "host --config /nowhere/host.toml", 1);
    lab.alpha.start();
    lab.beta.start();
    every_command_prints_one_value(&lab);
    what_is_not_there_is_said(&lab.alpha);
    wrong_usage_ends_with_two(&lab.alpha);
    the_api_answers(&lab);
}

fn every_command_prints_one_value(lab: &Lab) {
    let (alpha, beta) = (&lab.alpha, &lab.beta);
    let guest = one_value(alpha, "guest start --name vm --memory 64MiB --dirty-rate 20MiB", 0);
    assert_eq!((&guest["name"], &guest["state"]), (&"vm".into(), &"running".into()), "{guest:#}");
    assert!(one_value(alpha, "guest start --name vm --memory 64MiB", 1)["error"].is_string());
    assert_eq!(list(&one_value(alpha, "guest list", 0)).len(), 1);
    assert_eq!(one_value(alpha, "guest show vm", 0)["name"], "vm");
    assert_eq!(one_value(alpha, "guest verify vm", 0)["seen"]["corrupt"], 0);
    assert!(one_value(alpha, "guest console vm", 0)["text"].is_string());
    assert_eq!(one_value(alpha, "host", 0)["name"], "alpha");
    assert_eq!(one_value(alpha, "check vm --to beta", 0)["ok"], true);
    assert_eq!(one_value(alpha, "check vm --to nowhere.invalid", 1)["ok"], false);
    assert_eq!(list(&one_value(alpha, "status", 0)).len(), 0);
    assert_eq!(list(&one_value(alpha, "status --watch", 0)).len(), 0);
    let report = one_value(alpha, "migrate vm --to beta", 0);
    assert_eq!(report["state"], "completed", "{report:#}");
    let id = report["id"].as_str().expect("it has an identifier");
    let begun = one_value(beta, "migrate vm --to alpha --bandwidth 16MiB --detach", 0);
    let back = begun["id"].as_str().expect("it has an identifier");
    beta.in_phase(back, "pre-copy");
    assert!(one_value(beta, &format!("cancel {back}"), 0)["what"].is_string());
    let ended = one_value(beta, &format!("status {back} --watch"), 1);
    assert_eq!(ended["state"], "rolled_back", "{ended:#}");
    assert_eq!(moved(beta, "vm", "--to alpha")["state"], "completed");
    assert_eq!(one_value(alpha, &format!("status {id}"), 0)["id"], id);
    assert_eq!(one_value(alpha, &format!("status {}", &id[..8]), 0)["id"], id);

    let history = one_value(alpha, "history", 0);
    let directions: Vec<&str> =
        list(&history).iter().filter_map(|migration| migration["direction"].as_str()).collect();
    assert_eq!(directions, ["incoming", "incoming", "outgoing"], "{history:#}");
    assert_eq!(list(&one_value(alpha, "history --limit 1", 0)).len(), 1);
    let (code, text, _) = said(&alpha.run("history"));
    assert!(code == 0 && text.contains("to beta") && text.contains("from beta"), "{text}");

    let page = alpha.config().with_file_name("report.html");
    let done = one_value(alpha, &format!("report {id} --output {}", page.display()), 0);
    assert_eq!(done["what"], page.display().to_string(), "{done:#}");
    let html = fs::read_to_string(&page).expect("the page is written");
    assert!(html.contains("<svg") && html.contains(id) && !html.contains("src=\"http"), "{html}");

    assert_eq!(one_value(alpha, "config check", 0)["ok"], true);
    one_value(alpha, "config show", 0);
    let schema = said(&alpha.run("config schema")).1;
    assert!(serde_json::from_str::<Value>(&schema).is_ok(), "{schema}");
    let other = lab.pki().join("other");
    one_value(alpha, &format!("pki init --dir {}", other.display()), 0);
    one_value(alpha, &format!("pki issue gamma --dir {} --address 10.0.0.3", other.display()), 0);
    assert!(one_value(alpha, &format!("pki init --dir {}", other.display()), 1)["error"].is_string());
}

fn what_is_not_there_is_said(host: &Host) {
    for words in ["guest show ghost", "guest verify ghost", "guest stop ghost", "guest console ghost"] {
        one_line(host, words, "there is no guest \"ghost\"");
    }
    for words in ["migrate ghost --to beta", "check ghost --to beta"] {
        one_line(host, words, "there is no guest \"ghost\"");
    }
    for words in ["status feed", "cancel feed", "report feed"] {
        one_line(host, words, "\"feed\"");
    }
    one_line(host, "guest start --name a/b --memory 64MiB", "is no name of a guest");
    one_line(host, "guest start --name vm --memory 64MiB", "there is a guest \"vm\" on this host already");
    one_line(host, "host --socket /nowhere/socket", "no daemon answers at /nowhere/socket");
}

fn wrong_usage_ends_with_two(host: &Host) {
    for words in [
        "",
        "frobnicate",
        "migrate",
        "migrate vm",
        "migrate vm --to beta --mode carrier-pigeon",
        "migrate vm --to beta --bandwidth 100Mb",
        "migrate vm --to beta --channels 0",
        "check vm",
        "guest",
        "guest start --memory 64MiB",
        "guest start --name vm --memory 1000",
        "cancel",
        "history --limit many",
        "report",
        "pki issue",
        "serve --port 1",
    ] {
        let (code, stdout, stderr) = said(&host.run(words));
        assert_eq!((code, stdout.as_str()), (2, ""), "{words:?}: {stderr}");
        assert!(!stderr.is_empty(), "{words:?}");
    }
}

fn the_api_answers(lab: &Lab) {
    let host = &lab.alpha;
    let (status, head, metrics) = http(host, "GET", "/metrics", "");
    assert!(status == 200 && head.contains("content-type: application/openmetrics-text"), "{head}");
    let counted: Vec<&str> =
        metrics.lines().filter(|line| line.starts_with("pageferry_migrations_ended_total{")).collect();
    let has = |words: &[&str]| counted.iter().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(has(&["outgoing", "completed", " 1"]) && has(&["incoming", "completed", " 1"]), "{counted:#?}");

    let output = Command::new(PROGRAM).arg("openapi").output().expect("the program starts");
    let printed: Value = serde_json::from_slice(&output.stdout).expect("the document is JSON");
    let (status, _, served) = http(host, "GET", "/v1/openapi.json", "");
    assert_eq!((status, serde_json::from_str::<Value>(&served).ok().as_ref()), (200, Some(&printed)));
    let paths = printed["paths"].as_object().expect("it has paths");
    for (route, method) in [
        ("/v1/host", "get"),
        ("/v1/guests", "get"),
        ("/v1/guests", "post"),
        ("/v1/guests/{name}", "get"),
        ("/v1/guests/{name}", "delete"),
        ("/v1/guests/{name}/console", "get"),
        ("/v1/guests/{name}/verify", "post"),
        ("/v1/guests/{name}/migrate", "post"),
        ("/v1/guests/{name}/check", "post"),
        ("/v1/migrations", "get"),
        ("/v1/migrations/{id}", "get"),
        ("/v1/migrations/{id}/cancel", "post"),
        ("/v1/migrations/{id}/report", "get"),
        ("/v1/history", "get"),
        ("/metrics", "get"),
    ] {
        assert!(paths.get(route).is_some_and(|route| route.get(method).is_some()), "{method} {route}");
    }

    for (path, body, word) in [
        ("/v1/guests", "{", "EOF"),
        ("/v1/guests", r#"{"name": "x"}"#, "missing field"),
        ("/v1/guests/vm/migrate", r#"{"to": "beta", "modus": "tcp"}"#, "unknown field `modus`"),
        ("/v1/guests/vm/migrate", r#"{"to": 7}"#, "invalid type"),
        ("/v1/guests/vm/check", r#"{"to": "beta", "mode": "pigeon"}"#, "pigeon"),
    ] {
        let (status, _, answer) = http(host, "POST", path, body);
        let error =
            serde_json::from_str::<Value>(&answer).unwrap_or_else(|error| panic!("{error}: {answer}"));
        assert_eq!(status, 422, "{path} {body}: {answer}");
        assert!(error["error"].as_str().is_some_and(|error| error.contains(word)), "{path} {body}: {answer}");
    }
    let (status, _, answer) = http(host, "GET", "/v1/guests/ghost", "");
    assert!(status == 404 && answer.contains("ghost"), "{status} {answer}");
    let (status, _, answer) = http(host, "GET", "/v1/history?limit=many", "");
    assert!(status == 400 && !answer.is_empty(), "{status} {answer}");
}
