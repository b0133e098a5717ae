//! libibverbs, loaded when RDMA is first asked for and never linked, so that the program starts where it is not installed.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::OnceLock;

use super::abi::{
    AsyncEvent, CompChannel, Context, Cq, Device, DeviceAttr, GidEntry, Mr, Pd, PortAttr, Qp, QpAttr,
    QpInitAttr,
};
use super::error::VerbsError;

/// The name by which the dynamic loader finds it (Debian: package libibverbs1).
pub const LIBRARY: &str = "libibverbs.so.1";

/// Declares the functions that are looked up. Their manual pages are those of the same name; `verbs.h` calls the ones that
/// begin with an underscore through inline functions of the name without it.
macro_rules! functions {
    ($($field:ident = $symbol:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The functions of libibverbs. The library stays loaded until the process ends: its drivers do not unload.
        pub(super) struct Library {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl Library {
            /// Looks every function up, so that a library that is too old is found out here and not in a migration.
            fn resolve(library: &libloading::Library) -> Result<Self, VerbsError> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the symbol has this signature in every libibverbs of ABI 1 (`verbs.h`).
                        let found = unsafe { library.get(concat!(stringify!($symbol), "\0").as_bytes()) };
                        *found.map_err(|_| VerbsError::TooOld { symbol: stringify!($symbol) })?
                    },)*
                })
            }
        }
    };
}

functions! {
    get_device_list = ibv_get_device_list(*mut c_int) -> *mut *mut Device;
    free_device_list = ibv_free_device_list(*mut *mut Device);
    open_device = ibv_open_device(*mut Device) -> *mut Context;
    close_device = ibv_close_device(*mut Context) -> c_int;
    query_device = ibv_query_device(*mut Context, *mut DeviceAttr) -> c_int;
    query_port = ibv_query_port(*mut Context, u8, *mut PortAttr) -> c_int;
    query_gid_table = _ibv_query_gid_table(*mut Context, *mut GidEntry, usize, u32, usize) -> isize;
    alloc_pd = ibv_alloc_pd(*mut Context) -> *mut Pd;
    dealloc_pd = ibv_dealloc_pd(*mut Pd) -> c_int;
    reg_mr = ibv_reg_mr(*mut Pd, *mut c_void, usize, c_int) -> *mut Mr;
    dereg_mr = ibv_dereg_mr(*mut Mr) -> c_int;
    create_comp_channel = ibv_create_comp_channel(*mut Context) -> *mut CompChannel;
    destroy_comp_channel = ibv_destroy_comp_channel(*mut CompChannel) -> c_int;
    create_cq = ibv_create_cq(*mut Context, c_int, *mut c_void, *mut CompChannel, c_int) -> *mut Cq;
    destroy_cq = ibv_destroy_cq(*mut Cq) -> c_int;
    get_cq_event = ibv_get_cq_event(*mut CompChannel, *mut *mut Cq, *mut *mut c_void) -> c_int;
    ack_cq_events = ibv_ack_cq_events(*mut Cq, c_uint);
    create_qp = ibv_create_qp(*mut Pd, *mut QpInitAttr) -> *mut Qp;
    modify_qp = ibv_modify_qp(*mut Qp, *mut QpAttr, c_int) -> c_int;
    query_qp = ibv_query_qp(*mut Qp, *mut QpAttr, c_int, *mut QpInitAttr) -> c_int;
    destroy_qp = ibv_destroy_qp(*mut Qp) -> c_int;
    get_async_event = ibv_get_async_event(*mut Context, *mut AsyncEvent) -> c_int;
    ack_async_event = ibv_ack_async_event(*mut AsyncEvent);
}

impl Library {
    /// The library of this process, loaded by the first call.
    pub(super) fn get() -> Result<&'static Self, VerbsError> {
        static LOADED: OnceLock<Library> = OnceLock::new();
        if let Some(library) = LOADED.get() {
            return Ok(library);
        }
        // Two threads at once load it twice, which the loader counts, and one table of functions is as good as the other.
        let library = Self::load(LIBRARY)?;
        Ok(LOADED.get_or_init(|| library))
    }

    /// Loads a library by its name. A failure is not kept: the library may be installed while a daemon runs.
    fn load(name: &'static str) -> Result<Self, VerbsError> {
        // SAFETY: loading runs the library's constructors; those of libibverbs read their environment and nothing of ours.
        let library = unsafe { libloading::Library::new(name) }
            .map_err(|cause| VerbsError::NoLibrary { library: name, cause: Box::new(cause) })?;
        let functions = Self::resolve(&library)?;
        // It is not closed: what was looked up must stay.
        std::mem::forget(library);
        Ok(functions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named() {
        let error =
            Library::load("libibverbs-that-is-not-there.so.1").err().expect("there is no such library");
        let text = error.to_string();
        assert!(
            text.contains("libibverbs-that-is-not-there.so.1") && text.contains("install rdma-core"),
            "{text}"
        );
        assert!(std::error::Error::source(&error).is_some(), "the loader's own words are kept");
    }

    #[test]
    fn another_library_is_taken_for_an_old_one() {
        let error = Library::load("libc.so.6").err().expect("libc has no verbs");
        assert!(matches!(error, VerbsError::TooOld { symbol: "ibv_get_device_list" }), "{error}");
    }
}
