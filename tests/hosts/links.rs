//! Several links between two hosts: shared, pulled and put back, forbidden, capped.

use std::time::Duration;

use serde_json::Value;

use crate::ask::{channels, link, list, moved, reload};
use crate::lab::{Host, Lab, is_here};

const MIB: u64 = 1 << 20;
/// What a quiet interface sends by itself: neighbours are looked for, and IPv6 groups are joined.
const NOISE: u64 = 500;

fn both(host: &Host) -> [u64; 2] {
    [host.sent_by("pf0"), host.sent_by("pf1")]
}

/// What each link has carried meanwhile, by the kernel.
fn since(host: &Host, before: [u64; 2]) -> [u64; 2] {
    let now = both(host);
    [now[0] - before[0], now[1] - before[1]]
}

/// A guest whose memory is small and quiet, so that nearly everything moves in the first round.
fn start_quiet(host: &Host, name: &str) {
    host.done(&format!("guest start --name {name} --memory 64MiB --dirty-rate 256KiB"));
}

fn first_round(report: &Value) -> f64 {
    report["rounds"][0]["seconds"].as_f64().unwrap_or_else(|| panic!("no first round: {report:#}"))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[test]
fn two_links_carry_equal_shares_and_are_faster_than_one() {
    if !is_here() {
        return;
    }
    let lab = Lab::running("--rate 200mbit");
    start_quiet(&lab.alpha, "vm");
    let networks = r#"networks = ["10.77.0.0/24", "10.77.1.0/24"]"#;
    let (mut here, mut there) = (&lab.alpha, &lab.beta);
    let (mut one, mut two) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let before = both(here);
        let report = moved(here, "vm", &format!("--to {} --mode tcp", there.side));
        let sent = since(here, before);
        let told = [channels(&report, "pf0").2, channels(&report, "pf1").2];
        for [a, b] in [sent, told] {
            assert!(a > 20 * MIB && b > 20 * MIB, "{sent:?}, {told:?}: {report:#}");
            let share = a as f64 / (a + b) as f64;
            assert!((0.4..0.6).contains(&share), "{share}: {sent:?}, {told:?}: {report:#}");
        }
        two.push(first_round(&report));
        (here, there) = (there, here);

        // What one host does not list, neither uses.
        lab.alpha.reconfigure(networks, r#"networks = ["10.77.0.0/24"]"#);
        reload(&lab.alpha);
        let report = moved(here, "vm", &format!("--to {} --mode tcp", there.side));
        assert_eq!(list(&report["paths"]).len(), 1, "{report:#}");
        one.push(first_round(&report));
        (here, there) = (there, here);
        lab.alpha.reconfigure(r#"networks = ["10.77.0.0/24"]"#, networks);
        reload(&lab.alpha);
    }
    lab.alpha.check_whole("vm");
    let (one, two) = (median(one), median(two));
    println!(
        "the first round takes {one:.3} s by one link and {two:.3} s by two: {:.2} times as fast",
        one / two
    );
    assert!(one / two > 1.3, "{one} s by one link, {two} s by two");
}

#[test]
fn a_link_that_is_pulled_is_used_again_and_without_any_the_guest_stays() {
    if !is_here() {
        return;
    }
    let lab = Lab::running("--rate 200mbit");
    start_quiet(&lab.alpha, "vm");
    one_link_goes_and_returns(&lab);
    both_links_go_and_return(&lab);
    both_links_go_for_good(&lab);
}

fn under_way(host: &Host, flags: &str) -> String {
    let id = host.begin("vm", flags);
    host.wait_for("bytes on both links", |host| {
        let migration = host.migration(&id)?;
        let flows = |interface| link(&migration, interface)?["bytes"].as_u64().filter(|bytes| *bytes > MIB);
        flows("pf0").and(flows("pf1"))
    });
    id
}

fn one_link_goes_and_returns(lab: &Lab) {
    let (here, there) = (&lab.alpha, &lab.beta);
    let id = under_way(here, "--to beta --mode tcp --bandwidth 5MiB --verify");
    lab.script("link down 1");
    let seen = here.wait_for("the link to be seen without channels", |host| {
        link(&host.migration(&id)?, "pf1").filter(|link| link["channels"] == 0)
    });
    assert!(["down", "lost"].iter().any(|state| seen["state"] == *state), "{seen:#}");
    let bytes = |host: &Host, interface| link(&host.migration(&id)?, interface)?["bytes"].as_u64();
    let before = bytes(here, "pf0").expect("it is under way");
    here.wait_for("the other link to carry on", |host| bytes(host, "pf0").filter(|now| *now > before + MIB));
    lab.script("link up 1");
    let before = bytes(here, "pf1").expect("it is under way");
    let seen = here.wait_for("the link to carry something again", |host| {
        link(&host.migration(&id)?, "pf1")
            .filter(|link| link["state"] == "up" && link["bytes"].as_u64() > Some(before + MIB))
    });
    assert_eq!(seen["channels"], 1, "{seen:#}");

    let report = here.over(&id);
    assert_eq!((&report["state"], &report["ram_equal"]), (&"completed".into(), &true.into()), "{report:#}");
    assert_eq!(channels(&report, "pf0").0, 1, "{report:#}");
    let (all, lost, _) = channels(&report, "pf1");
    assert_eq!((all, lost), (2, 1), "{report:#}");
    let warnings = report["warnings"].to_string();
    assert!(warnings.contains("pf1"), "{report:#}");
    let log = report["log"].to_string();
    assert!(log.contains("interface pf1 is down") && log.contains("interface pf1 is up"), "{report:#}");
    there.check_whole("vm");
}

/// For less time than channels are waited for, and without the control link, too.
fn both_links_go_and_return(lab: &Lab) {
    let (here, there) = (&lab.beta, &lab.alpha);
    let id = under_way(here, "--to alpha --mode tcp --bandwidth 8MiB --verify");
    lab.script("link down 0");
    lab.script("link down 1");
    std::thread::sleep(Duration::from_secs(2));
    lab.script("link up 0");
    lab.script("link up 1");
    let report = here.over(&id);
    assert_eq!((&report["state"], &report["ram_equal"]), (&"completed".into(), &true.into()), "{report:#}");
    there.check_whole("vm");
}

fn both_links_go_for_good(lab: &Lab) {
    let (here, there) = (&lab.alpha, &lab.beta);
    let moving = here.command("migrate vm --to beta --mode tcp --bandwidth 4MiB --json");
    let moving = std::thread::scope(|scope| {
        let moving = scope.spawn(|| {
            let mut moving = moving;
            moving.output().expect("the program starts")
        });
        let id = here.wait_for("the migration", |host| {
            let all = host.done("status");
            let migration = list(&all).first()?.clone();
            let carries = link(&migration, "pf0")?["bytes"].as_u64() > Some(MIB);
            carries.then(|| migration["id"].as_str().expect("it has an identifier").to_owned())
        });
        lab.script("link down 0");
        lab.script("link down 1");
        here.wait_for("a note about it", |host| {
            host.migration(&id)?["progress"]["note"].as_str().filter(|note| note.contains("pf0")).map(drop)
        });
        moving.join().expect("it ends")
    });
    let report: Value = serde_json::from_slice(&moving.stdout).expect("it prints JSON");
    assert_eq!((&report["state"], moving.status.code()), (&"rolled_back".into(), Some(1)), "{report:#}");
    let cause = report["cause"].as_str().expect("there is a cause");
    println!("both links gone: {cause}");
    assert!(cause.contains("the last channel is lost") && cause.contains("down: pf0, pf1"), "{report:#}");
    here.check_whole("vm");
    // The place there is given up as soon as the destination can be told.
    lab.script("link up 0");
    lab.script("link up 1");
    there.wait_for("the place to be given up", |host| (host.guest_state("vm") == "none").then_some(()));
    assert!(there.log().contains("the other host says: the guest goes on at the source"), "{}", there.log());
    let report = moved(here, "vm", "--to beta");
    assert_eq!(list(&report["paths"]).len(), 2, "{report:#}");
    there.check_whole("vm");
}

#[test]
fn what_the_host_file_does_not_allow_is_not_used_and_caps_hold() {
    if !is_here() {
        return;
    }
    let mut lab = Lab::up("--rate none");
    // A link that comes up after the daemons have started.
    lab.script("link down 1");
    lab.alpha.start();
    lab.beta.start();
    start_quiet(&lab.alpha, "vm");
    assert_eq!(listening(&lab.alpha), ["10.77.0.1:7433"]);
    lab.script("link up 1");
    for (host, address) in [(&lab.alpha, "10.77.1.1:7433"), (&lab.beta, "10.77.1.2:7433")] {
        host.wait_for("it to listen at the new link", |host| {
            listening(host).iter().any(|at| at == address).then_some(())
        });
    }
    let report = moved(&lab.alpha, "vm", "--to beta");
    assert_eq!(list(&report["paths"]).len(), 2, "{report:#}");
    let report = moved(&lab.beta, "vm", "--to alpha");
    assert_eq!(list(&report["paths"]).len(), 2, "{report:#}");

    let everything = r#"networks = ["10.77.0.0/24", "10.77.1.0/24"]"#;
    listed_only(&lab, everything, r#"networks = ["10.77.0.0/24"]"#, 0);
    listed_only(&lab, r#"networks = ["10.77.0.0/24"]"#, r#"networks = ["pf1"]"#, 1);
    capped(&lab, r#"networks = ["pf1"]"#);
}

fn listening(host: &Host) -> Vec<String> {
    let info = host.done("host");
    list(&info["listening"]).iter().map(|at| at.as_str().expect("an address").to_owned()).collect()
}

/// Both host files allow one link; checks and migrations there and back leave the other alone.
fn listed_only(lab: &Lab, before: &str, now: &str, link: usize) {
    for host in [&lab.alpha, &lab.beta] {
        host.reconfigure(before, now);
        reload(host);
    }
    // The connections of what was allowed before are gone.
    std::thread::sleep(Duration::from_secs(1));
    let counted = [both(&lab.alpha), both(&lab.beta)];
    assert_eq!(lab.alpha.done("check vm --to beta")["ok"], true);
    let reports = [moved(&lab.alpha, "vm", "--to beta"), moved(&lab.beta, "vm", "--to alpha")];
    let sent = [since(&lab.alpha, counted[0]), since(&lab.beta, counted[1])];
    for host in sent {
        assert!(host[link] > MIB && host[1 - link] < NOISE, "{now}: alpha and beta sent {sent:?}");
    }
    for report in reports {
        let interfaces = list(&report["channels"]).iter().map(|channel| channel["interface"].as_str());
        let allowed = format!("pf{link}");
        assert!(interfaces.clone().all(|name| name == Some(&allowed)), "{report:#}");
    }
}

/// What a migration sends in a second, by the kernel and its own account.
fn capped(lab: &Lab, before: &str) {
    let both_capped = r#"networks = ["10.77.0.0/24", { interface = "pf1", bandwidth_cap = "4MiB/s" }]"#;
    for host in [&lab.alpha, &lab.beta] {
        host.reconfigure(before, both_capped);
        reload(host);
    }
    let host_too = format!("bandwidth_cap = \"16MiB/s\"\n{both_capped}");
    // By the network's cap alone, the other link has no limit; then the host's holds over both; then the request's.
    for (flags, config, limits) in [
        ("", None, [None, Some(4)]),
        ("", Some(&host_too), [Some(16), Some(4)]),
        ("--bandwidth 8MiB", None, [Some(8), Some(4)]),
    ] {
        if let Some(config) = config {
            lab.alpha.reconfigure(both_capped, config);
            reload(&lab.alpha);
        }
        let counted = both(&lab.alpha);
        let report = moved(&lab.alpha, "vm", &format!("--to beta --mode tcp {flags}"));
        let sent = since(&lab.alpha, counted);
        let seconds = report["total_seconds"].as_f64().expect("it took some time");
        let rate = |bytes: u64| bytes as f64 / seconds / MIB as f64;
        let [all, second] = [rate(sent[0] + sent[1]), rate(sent[1])];
        println!(
            "caps {limits:?} MiB/s: {all:.1} MiB/s, {second:.1} of them by the second link, in {seconds:.2} s"
        );
        // What the wire carries besides memory (headers, the checks) comes on top, and what may be sent at once.
        for (measured, limit) in [(all, limits[0]), (second, limits[1])] {
            let limit = limit.map_or(f64::INFINITY, f64::from);
            assert!(measured < limit * 1.25 + 1.0, "{measured} MiB/s of {limit}: {report:#}");
        }
        let paths = list(&report["paths"]);
        assert_eq!(paths.len(), 2, "{report:#}");
        assert_eq!(paths[1]["bandwidth_cap"], 4 * MIB, "{report:#}");
        moved(&lab.beta, "vm", "--to alpha --bandwidth 1GiB");
    }
    lab.alpha.check_whole("vm");
}
