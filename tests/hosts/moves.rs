//! A guest moves from one host to the other, in every mode.

use crate::lab::{Lab, is_here};

#[test]
fn a_guest_under_load_moves_in_every_mode() {
    if !is_here() {
        return;
    }
    let lab = Lab::running("");
    lab.alpha.start_guest("vm", "");
    let (mut here, mut there) = (&lab.alpha, &lab.beta);
    for (mode, used) in
        [("tcp", "tcp"), ("compression", "compression"), ("rdma", "tcp"), ("auto", "compression")]
    {
        let report = here.done(&format!("migrate vm --to {} --mode {mode} --verify", there.side));
        assert_eq!(report["state"], "completed", "{report:#}");
        assert_eq!(report["mode_used"], used, "{report:#}");
        assert_eq!(report["ram_equal"], true, "{report:#}");
        assert_eq!(report["insecure"], false, "{report:#}");
        let interfaces: Vec<&str> = report["channels"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|channel| channel["interface"].as_str())
            .collect();
        assert_eq!(interfaces, ["pf0", "pf1"], "{report:#}");
        assert_eq!(report["warnings"].as_array().unwrap().len(), 0, "{report:#}");
        assert_eq!(here.guest_state("vm"), "none");
        there.check_whole("vm");
        (here, there) = (there, here);
    }
}
