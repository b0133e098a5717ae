//! `pageferry rdma devices`: what this host has for RDMA, and of each part whether it can be used or why not.

use std::io::{self, Write};

use crate::host::exit::Exit;
use crate::session::rdma::{Gid, Port, RdmaDevice, RdmaDevices, Reason};

/// Prints the devices on stdout. A host without a usable one ends in [`Exit::Failed`].
#[must_use]
pub fn devices(json: bool) -> Exit {
    let found = RdmaDevices::of_this_host();
    let text = if json {
        // Numbers, texts and lists of them.
        serde_json::to_string_pretty(&found).expect("the devices are plain data") + "\n"
    } else {
        account(&found)
    };
    // Whoever closed stdout does not want the rest.
    let _ = io::stdout().write_all(text.as_bytes());
    if found.reason.is_none() { Exit::Completed } else { Exit::Failed }
}

fn account(found: &RdmaDevices) -> String {
    let mut text = String::new();
    match &found.reason {
        None => text += "RDMA can be used.\n",
        Some(reason) => text += &format!("RDMA cannot be used: {reason}.\n"),
    }
    for device in &found.devices {
        text += "\n";
        text += &device_account(device);
    }
    if let Some(limit) = found.memory_lock.limit_bytes {
        text += &format!(
            "\nThis user may lock {limit} bytes of memory, and no larger guest can use RDMA; ulimit -l, LimitMEMLOCK= or CAP_IPC_LOCK \
             allow more.\n"
        );
    }
    text
}

fn device_account(device: &RdmaDevice) -> String {
    let mut text = format!("{} ({}): {}\n", device.name, device.node, verdict(device.reason.as_ref()));
    for port in &device.ports {
        text += &port_account(port);
    }
    if let Some(limits) = &device.limits {
        let firmware = if limits.firmware.is_empty() {
            String::new()
        } else {
            format!("; firmware {}", limits.firmware)
        };
        let region = match limits.memory_region_bytes {
            u64::MAX => "any size".to_owned(),
            bytes => format!("{bytes} bytes"),
        };
        let paging = if limits.on_demand_paging { ", paged on demand" } else { "" };
        text += &format!(
            "  at most {} queue pairs of {} work requests with {} segments, {} completions in a queue, {} memory regions of \
             {region}{paging}{firmware}\n",
            limits.queue_pairs,
            limits.work_requests,
            limits.segments,
            limits.completions,
            limits.memory_regions,
        );
    }
    text
}

fn port_account(port: &Port) -> String {
    let speed = port
        .bits_per_second
        .map_or_else(|| "unknown speed".to_owned(), |speed| format!("{} Gbit/s", speed as f64 / 1e9));
    let mut text = format!(
        "  port {}: {}, {}, {speed}, MTU {} of {}: {}\n",
        port.number,
        port.state,
        port.link_layer,
        port.active_mtu,
        port.max_mtu,
        verdict(port.reason.as_ref())
    );
    for gid in &port.gids {
        text += &gid_account(gid);
    }
    text
}

fn gid_account(gid: &Gid) -> String {
    let address = gid.address.map_or_else(|| gid.gid.to_string(), |address| address.to_string());
    let interface = gid.interface.as_ref().map_or_else(String::new, |name| format!(" on {name}"));
    let usable = if gid.usable { "usable" } else { "not for migrations" };
    format!("    GID {}: {address}{interface}, {}: {usable}\n", gid.index, gid.kind)
}

fn verdict(reason: Option<&Reason>) -> String {
    reason.map_or_else(|| "usable".to_owned(), ToString::to_string)
}
