"""Arrays alone: spectra, products, log scale, Krylov, LAPACK on the host. No module here knows a step."""
