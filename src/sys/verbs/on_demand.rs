//! Whether a device pages on demand.

use super::abi;
use super::device::Context;

impl Context {
    /// What ibv_query_device_ex(3) says of it, which is an inline function: it looks up a function in front of the context.
    pub(super) fn has_on_demand_paging(&self) -> bool {
        let context = self.raw.as_ptr();
        // SAFETY: the context is open; the library never changes this field.
        if unsafe { (*context).abi_compat }.addr() != usize::MAX {
            return false;
        }
        // SAFETY: the field says that the context is the last field of a `struct verbs_context`, all of which was allocated
        // together; its `sz` is right in front of it and says whether the function is there.
        let (size, call) = unsafe {
            let extension = context.cast::<u8>().sub(size_of::<abi::Extension>()).cast::<abi::Extension>();
            let size = (&raw const (*extension).sz).read();
            let needed = size_of::<abi::Extension>() + size_of::<abi::Context>();
            (size, (size >= needed).then(|| (&raw const (*extension).query_device_ex).read()).flatten())
        };
        let Some(call) = call else {
            tracing::debug!(size, device = self.name(), "libibverbs cannot be asked about on-demand paging");
            return false;
        };
        // SAFETY: numbers and bytes, of which any value is valid.
        let mut raw: abi::DeviceAttrEx = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open; the library writes at most as many bytes as it is told.
        let answer = unsafe { call(context, std::ptr::null(), &raw mut raw, size_of::<abi::DeviceAttrEx>()) };
        let needed = abi::IBV_ODP_SUPPORT_SEND | abi::IBV_ODP_SUPPORT_WRITE;
        answer == 0
            && raw.odp_caps.general_caps & u64::from(abi::IBV_ODP_SUPPORT) != 0
            && raw.odp_caps.rc_odp_caps & needed == needed
    }
}
