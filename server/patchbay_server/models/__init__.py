"""Models the service can host: loading, binding of sites, and the small embedded one."""
