//! Holds `abi` to `layout.txt`: size, alignment and offsets as `verbs.h` has them. `scripts/check-verbs-layout` holds that
//! file to an installed header, so that a test without one is enough here.

use std::fmt::Write;
use std::mem::offset_of;

use super::abi;

/// Appends a structure of the header and those of its fields that have a name here. Fields of its unions are named by the path
/// that C takes to them. A `prefix` is only the beginning of a structure, whose size is the library's own affair.
macro_rules! structure {
    ($text:ident, $rust:ident = $c:literal { $($field:ident $(= $path:literal)?),* $(,)? }) => {
        writeln!($text, "structure {} size {} align {}", $c, size_of::<abi::$rust>(), align_of::<abi::$rust>()).unwrap();
        structure!(@fields $text, $rust = $c { $($field $(= $path)?),* });
    };
    ($text:ident, prefix $rust:ident = $c:literal { $($field:ident $(= $path:literal)?),* $(,)? }) => {
        structure!(@fields $text, $rust = $c { $($field $(= $path)?),* });
    };
    (@fields $text:ident, $rust:ident = $c:literal { $($field:ident $(= $path:literal)?),* }) => {
        $({
            let path: &[&str] = &[$($path,)? stringify!($field)];
            writeln!($text, "field {} {} {}", $c, path[0], offset_of!(abi::$rust, $field)).unwrap();
        })*
    };
}

fn layout() -> String {
    let mut text = String::from(
        "# The part of infiniband/verbs.h that src/sys/verbs/abi.rs declares, on 64 bit. The test sys::verbs::layout compares the\n\
         # two; with PAGEFERRY_BLESS=1 it writes this file. scripts/check-verbs-layout compares this file and an installed header.\n",
    );
    structure!(text, prefix Device = "struct ibv_device" { node_type, transport_type, name, dev_name });
    structure!(text, ContextOps = "struct ibv_context_ops" { poll_cq, req_notify_cq, post_send, post_recv });
    structure!(text, Context = "struct ibv_context" {
        device, ops, cmd_fd, async_fd, num_comp_vectors, mutex, abi_compat,
    });
    structure!(text, prefix Pd = "struct ibv_pd" { context });
    structure!(text, Mr = "struct ibv_mr" { context, pd, addr, length, handle, lkey, rkey });
    structure!(text, prefix CompChannel = "struct ibv_comp_channel" { context, fd });
    structure!(text, prefix Cq = "struct ibv_cq" { context, channel, cq_context, handle, cqe });
    structure!(text, prefix Qp = "struct ibv_qp" { context, qp_context, pd, send_cq, recv_cq, srq, handle, qp_num });
    structure!(text, DeviceAttr = "struct ibv_device_attr" {
        fw_ver, node_guid, sys_image_guid, max_mr_size, page_size_cap, vendor_id, vendor_part_id, hw_ver, max_qp, max_qp_wr,
        device_cap_flags, max_sge, max_sge_rd, max_cq, max_cqe, max_mr, max_pd, max_pkeys, local_ca_ack_delay, phys_port_cnt,
    });
    structure!(text, prefix DeviceAttrEx = "struct ibv_device_attr_ex" { orig_attr, comp_mask, odp_caps });
    structure!(text, OdpCaps = "struct ibv_odp_caps" {
        general_caps, rc_odp_caps = "per_transport_caps.rc_odp_caps", uc_odp_caps = "per_transport_caps.uc_odp_caps",
        ud_odp_caps = "per_transport_caps.ud_odp_caps",
    });
    // It grows at its beginning, so that what holds is how far in front of the context something is.
    for (field, offset) in [
        ("query_device_ex", offset_of!(abi::Extension, query_device_ex)),
        ("sz", offset_of!(abi::Extension, sz)),
    ] {
        let distance = size_of::<abi::Extension>() - offset;
        writeln!(text, "before struct verbs_context {field} context {distance}").unwrap();
    }
    structure!(text, prefix PortAttr = "struct ibv_port_attr" {
        state, max_mtu, active_mtu, gid_tbl_len, port_cap_flags, max_msg_sz, bad_pkey_cntr, qkey_viol_cntr, pkey_tbl_len, lid,
        sm_lid, lmc, max_vl_num, sm_sl, subnet_timeout, init_type_reply, active_width, active_speed, phys_state, link_layer,
        flags, port_cap_flags2,
    });
    structure!(text, Gid = "union ibv_gid" { raw });
    structure!(text, GidEntry = "struct ibv_gid_entry" { gid, gid_index, port_num, gid_type, ndev_ifindex });
    structure!(text, GlobalRoute = "struct ibv_global_route" { dgid, flow_label, sgid_index, hop_limit, traffic_class });
    structure!(text, AhAttr = "struct ibv_ah_attr" { grh, dlid, sl, src_path_bits, static_rate, is_global, port_num });
    structure!(text, QpCap = "struct ibv_qp_cap" {
        max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data,
    });
    structure!(text, QpInitAttr = "struct ibv_qp_init_attr" {
        qp_context, send_cq, recv_cq, srq, cap, qp_type, sq_sig_all,
    });
    structure!(text, QpAttr = "struct ibv_qp_attr" {
        qp_state, cur_qp_state, path_mtu, path_mig_state, qkey, rq_psn, sq_psn, dest_qp_num, qp_access_flags, cap, ah_attr,
        alt_ah_attr, pkey_index, alt_pkey_index, en_sqd_async_notify, sq_draining, max_rd_atomic, max_dest_rd_atomic,
        min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry, alt_port_num, alt_timeout, rate_limit,
    });
    structure!(text, Sge = "struct ibv_sge" { addr, length, lkey });
    structure!(text, SendWr = "struct ibv_send_wr" {
        wr_id, next, sg_list, num_sge, opcode, send_flags, imm_data, remote_addr = "wr.rdma.remote_addr", rkey = "wr.rdma.rkey",
    });
    structure!(text, RecvWr = "struct ibv_recv_wr" { wr_id, next, sg_list, num_sge });
    structure!(text, Wc = "struct ibv_wc" {
        wr_id, status, opcode, vendor_err, byte_len, imm_data, qp_num, src_qp, wc_flags, pkey_index, slid, sl, dlid_path_bits,
    });
    structure!(text, AsyncEvent = "struct ibv_async_event" { element, event_type });
    for (name, value) in abi::CONSTANTS {
        writeln!(text, "constant {name} {value}").unwrap();
    }
    text
}

#[test]
fn the_structures_are_laid_out_as_the_header_has_them() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/src/sys/verbs/layout.txt");
    if std::env::var_os("PAGEFERRY_BLESS").is_some() {
        std::fs::write(file, layout()).unwrap();
    }
    let recorded = std::fs::read_to_string(file).unwrap();
    for (ours, recorded) in layout().lines().zip(recorded.lines()) {
        assert_eq!(ours, recorded);
    }
    assert_eq!(layout().lines().count(), recorded.lines().count());
}
