//! Who may send a guest here: hosts that prove who they are, and nobody else.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use pageferry::host::pki::Authority;
use time::OffsetDateTime;

use crate::ask::{check, failed, list, moved, said};
use crate::lab::{Host, Lab, is_here};

/// Long enough for two daemons to start on a busy machine.
const SOON: time::Duration = time::Duration::seconds(10);

fn addresses(host: &Host) -> [IpAddr; 2] {
    let last = if host.side == "alpha" { 1 } else { 2 };
    [0, 1].map(|link| IpAddr::from([10, 77, link, last]))
}

/// Gives a host a certificate of another authority or for another time, in place of its own.
fn issue(lab: &Lab, host: &Host, authority: &Authority, name: &str, until: OffsetDateTime) {
    let issued = authority
        .issue_between(name, &addresses(host), OffsetDateTime::now_utc() - SOON, until)
        .expect("it is issued");
    for file in [format!("{}.pem", host.side), format!("{}-key.pem", host.side)] {
        let _ = fs::remove_file(lab.pki().join(file));
    }
    issued.write(&lab.pki(), host.side).expect("it is written");
}

fn later() -> OffsetDateTime {
    OffsetDateTime::now_utc() + time::Duration::days(1)
}

fn stop(host: &mut Host) {
    host.signal("TERM");
    assert!(host.ended(), "{}", host.log());
}

fn restart(host: &mut Host) {
    stop(host);
    host.start();
}

/// A check and a migration from alpha to beta are refused for this reason, and beta has done nothing for them.
#[track_caller]
fn refused(lab: &Lab, reason: &str, words: &[&str]) {
    let (code, report) = lab.alpha.json("check vm --to beta");
    assert_eq!((code, failed(&report).as_slice()), (1, [reason].as_slice()), "{report:#}");
    let finding = check(&report, reason).to_string();
    println!("{finding}");
    let (code, report) = lab.alpha.json("migrate vm --to beta");
    assert_eq!((code, &report["state"]), (1, &"rolled_back".into()), "{report:#}");
    let (_, shown, also) = said(&lab.alpha.run("migrate vm --to beta"));
    for word in words {
        assert!(finding.contains(word), "{word:?} is not in {finding}");
        assert!(report["cause"].as_str().is_some_and(|cause| cause.contains(word)), "{word:?}: {report:#}");
        assert!(shown.contains(word), "{word:?}: {shown}{also}");
    }
    assert_eq!(lab.alpha.guest_state("vm"), "running");
    nothing_at(&lab.beta);
}

/// No guest, no account of a migration, and no process but the daemon.
#[track_caller]
fn nothing_at(host: &Host) {
    for words in ["guest list", "status", "history"] {
        let all = host.done(words);
        assert_eq!(list(&all).len(), 0, "{words}: {all:#}");
    }
    let state = host.config().with_file_name("state");
    for directory in ["run", "log", "guests", "migrations"] {
        let files = |path: &Path| fs::read_dir(path).expect("it is there").count();
        assert_eq!(files(&state.join(directory)), 0, "{directory}");
    }
}

#[test]
fn only_hosts_of_one_authority_that_are_who_they_say_move_guests() {
    if !is_here() {
        return;
    }
    let mut lab = Lab::running("--rate none");
    let own = Authority::load(&lab.pki()).expect("the lab has an authority");
    let foreign = Authority::create().expect("there is another");
    lab.alpha.start_guest("vm", "");

    // Another authority's certificate: beta's first, then alpha's.
    let text = fs::read_to_string(lab.beta.config()).expect("the host file is there");
    let foreign_ca = lab.pki().join("foreign.pem");
    fs::write(&foreign_ca, foreign.certificate()).expect("it is written");
    let with_foreign = text.replace("/ca.pem", "/foreign.pem");
    fs::write(lab.beta.config(), &with_foreign).expect("it is written");
    issue(&lab, &lab.beta, &foreign, "beta", later());
    restart(&mut lab.beta);
    refused(&lab, "trust", &["10.77.0.2:7433", "a CA that this host does not trust"]);
    fs::write(lab.beta.config(), &text).expect("it is written");
    issue(&lab, &lab.beta, &own, "beta", later());
    restart(&mut lab.beta);
    let both = format!("{}{}", own.certificate(), foreign.certificate());
    fs::write(&foreign_ca, both).expect("it is written");
    lab.alpha.reconfigure("/ca.pem", "/foreign.pem");
    issue(&lab, &lab.alpha, &foreign, "alpha", later());
    restart(&mut lab.alpha);
    refused(&lab, "trust", &["10.77.0.2:7433", "was not signed by the CA that it trusts"]);
    lab.alpha.reconfigure("/foreign.pem", "/ca.pem");
    issue(&lab, &lab.alpha, &own, "alpha", later());
    restart(&mut lab.alpha);

    // Another host answers where beta is looked for.
    lab.beta.reconfigure("name = \"beta\"", "name = \"gamma\"");
    issue(&lab, &lab.beta, &own, "gamma", later());
    restart(&mut lab.beta);
    refused(&lab, "trust", &["its certificate is for", "gamma", "not for beta"]);
    lab.beta.reconfigure("name = \"gamma\"", "name = \"beta\"");

    // Certificates whose time is over: beta's, then alpha's.
    let end = OffsetDateTime::now_utc() + SOON;
    issue(&lab, &lab.alpha, &own, "alpha", end);
    issue(&lab, &lab.beta, &own, "beta", end);
    restart(&mut lab.alpha);
    restart(&mut lab.beta);
    let left = (end - OffsetDateTime::now_utc()).max(time::Duration::ZERO).unsigned_abs();
    std::thread::sleep(left + Duration::from_secs(2));
    refused(&lab, "trust", &["its certificate has expired"]);
    issue(&lab, &lab.beta, &own, "beta", later());
    restart(&mut lab.beta);
    refused(&lab, "trust", &["finds this host's certificate expired"]);
    // Such a host does not start at all, and says why.
    stop(&mut lab.alpha);
    lab.alpha.spawn("");
    assert!(!lab.alpha.ended(), "it started with a certificate that has expired");
    let log = lab.alpha.log();
    assert!(log.contains("alpha.pem") && log.contains("expired"), "{log}");

    issue(&lab, &lab.alpha, &own, "alpha", later());
    lab.alpha.start();
    let report = moved(&lab.alpha, "vm", "--to beta");
    assert_eq!(report["insecure"], false, "{report:#}");
    assert!(!lab.alpha.log().contains("[insecure"), "{}", lab.alpha.log());
    lab.beta.check_whole("vm");
}

/// Takes the certificates out of a host file.
fn without_certificates(host: &Host) {
    let text = fs::read_to_string(host.config()).expect("the host file is there");
    let (before, table) = text.split_once("[tls]").expect("it names certificates");
    let (_, after) = table.split_once("[peers]").expect("it names peers");
    fs::write(host.config(), format!("{before}\n[peers]{after}")).expect("it is written");
}

#[test]
fn without_certificates_a_host_keeps_to_itself_unless_it_is_told_otherwise() {
    if !is_here() {
        return;
    }
    let mut lab = Lab::running("--rate none");
    lab.alpha.start_guest("vm", "");

    // Neither certificates nor leave to do without: nobody reaches it.
    let with = fs::read_to_string(lab.beta.config()).expect("the host file is there");
    without_certificates(&lab.beta);
    restart(&mut lab.beta);
    let info = lab.beta.done("host");
    let listening = list(&info["listening"]);
    assert!(!listening.is_empty(), "{info:#}");
    assert!(
        listening
            .iter()
            .all(|at| at.as_str().is_some_and(|at| at.starts_with("127.") || at.starts_with("[::1]"))),
        "{info:#}"
    );
    let (code, shown, _) = said(&lab.beta.run("host"));
    assert!(code == 0 && shown.contains("loopback only"), "{shown}");
    assert!(lab.beta.log().contains("loopback only"), "{}", lab.beta.log());
    refused(&lab, "reachable", &["10.77.1.2:7433", "refused", "pageferry serve"]);

    // It does without, and the other does not: alpha asks in TLS, then beta does.
    lab.beta.configure("allow_insecure = true");
    restart(&mut lab.beta);
    refused(&lab, "trust", &["does that host have certificates?"]);
    fs::write(lab.beta.config(), with).expect("it is written");
    without_certificates(&lab.alpha);
    lab.alpha.configure("allow_insecure = true");
    restart(&mut lab.beta);
    restart(&mut lab.alpha);
    refused(&lab, "trust", &["certificate"]);

    // Both do without: it works, and whatever is said about it says so.
    without_certificates(&lab.beta);
    lab.beta.configure("allow_insecure = true");
    restart(&mut lab.beta);
    let (code, report) = lab.alpha.json("check vm --to beta");
    assert_eq!((code, &check(&report, "trust")["status"]), (0, &"note".into()), "{report:#}");
    let report = moved(&lab.alpha, "vm", "--to beta");
    assert_eq!(report["insecure"], true, "{report:#}");
    let id = report["id"].as_str().expect("it has an identifier");
    for host in [&lab.alpha, &lab.beta] {
        let log = host.log();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(&id[..8])).collect();
        assert!(lines.len() > 2, "{log}");
        assert!(lines.iter().all(|line| line.contains("[insecure")), "{lines:#?}");
        let (_, shown, _) = said(&host.run(&format!("status {id}")));
        assert!(shown.contains("insecure"), "{shown}");
        let (_, shown, _) = said(&host.run("history"));
        assert!(shown.contains("insecure"), "{shown}");
    }
    lab.beta.check_whole("vm");
}

/// Whether the last report says of every connection that it was encrypted, by interface.
#[track_caller]
fn encrypted(report: &serde_json::Value) -> Vec<(String, bool)> {
    let channels = list(&report["channels"]);
    assert!(!channels.is_empty(), "{report:#}");
    let of = |channel: &serde_json::Value| {
        let interface = channel["interface"].as_str().expect("it is known").to_owned();
        (interface, channel["encrypted"].as_bool().expect("it is said"))
    };
    let mut said: Vec<_> = channels.iter().map(of).collect();
    said.sort();
    said.dedup();
    said
}

#[test]
fn memory_is_encrypted_where_a_host_file_demands_it() {
    if !is_here() {
        return;
    }
    let mut lab = Lab::running("--rate none");
    lab.alpha.start_guest("vm", "");
    let plain = moved(&lab.alpha, "vm", "--to beta");
    assert!(encrypted(&plain).iter().all(|(_, encrypted)| !encrypted), "{plain:#}");

    // What one host demands, both do, in either direction; RDMA is out of the question then.
    lab.beta.configure("encryption = \"required\"");
    restart(&mut lab.beta);
    let report = lab.beta.done("check vm --to alpha --mode rdma");
    let found = check(&report, "encryption").to_string();
    assert!(found.contains("the host file of beta demands encryption: guest memory is encrypted"), "{found}");
    let back = moved(&lab.beta, "vm", "--to alpha");
    let forth = moved(&lab.alpha, "vm", "--to beta");
    for (host, report) in [(&lab.beta, &back), (&lab.alpha, &forth)] {
        assert!(encrypted(report).iter().all(|(_, encrypted)| *encrypted), "{report:#}");
        assert!(host.log().contains("of TCP under TLS on"), "{}", host.log());
        let id = report["id"].as_str().expect("it has an identifier");
        let (_, shown, _) = said(&host.run(&format!("status {id}")));
        assert!(shown.contains("TCP, encrypted"), "{shown}");
    }
    lab.beta.check_whole("vm");

    // A network that both call isolated carries memory in plain, the other does not.
    for host in [&lab.alpha, &lab.beta] {
        let text = fs::read_to_string(host.config()).expect("the host file is there");
        let rest: Vec<&str> = text.lines().filter(|line| !line.starts_with("networks")).collect();
        let networks = "networks = [{ subnet = \"10.77.0.0/24\", isolated = true }, \"10.77.1.0/24\"]";
        fs::write(host.config(), format!("{networks}\n{}\n", rest.join("\n"))).expect("it is written");
    }
    restart(&mut lab.alpha);
    restart(&mut lab.beta);
    let report = moved(&lab.beta, "vm", "--to alpha");
    let said = encrypted(&report);
    assert_eq!(said.iter().map(|(_, encrypted)| *encrypted).collect::<Vec<_>>(), [false, true], "{report:#}");
    lab.alpha.check_whole("vm");
}
